import itertools
from pathlib import Path

import pytest
import torch
from PIL import Image

from utils.errors import UsageError
from utils.request import LONGEST_TEXT, Request, noise


@pytest.mark.parametrize(("height", "width"), [(64, 64), (48, 80)])
def test_noise_is_what_the_pipeline_draws_in_float32(tiny, height: int, width: int) -> None:
    pipe = tiny()
    drawn = noise(pipe, height, width, [3, 4])
    assert (drawn.shape, drawn.dtype, drawn.device.type) == ((2, height * width // 256, 64), torch.float32, "cpu")
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    own, _ = pipe.prepare_latents(2, 16, height, width, torch.float32, pipe.device, generators)
    assert torch.equal(drawn, own)


def test_every_dtype_draws_the_same_image(tiny) -> None:
    """PyTorch 2.11's own noise in bfloat16 would make this two images."""
    request = Request("a red circle", 64, 64, 2, 0.0, 64, batch=2, seed=3)
    single, half = (
        tiny(dtype)(**request.arguments(tiny(dtype)) | {"output_type": "latent"}).images.float()
        for dtype in (torch.float32, torch.bfloat16)
    )
    for (i, a), (j, b) in itertools.product(enumerate(single), enumerate(half)):
        error = (a - b).norm() / a.norm()
        assert error < 0.1 if i == j else error > 0.5


@pytest.mark.parametrize("tokens", [-1, 0, 513, 100_000])
def test_text_that_diffusers_takes_no_more(tokens: int) -> None:
    Request("a red circle", 64, 64, 1, 0.0, 512)
    with pytest.raises(UsageError, match=f"--text-lengths {tokens}: give 1 to 512"):
        Request("a red circle", 64, 64, 1, 0.0, tokens)


def test_the_longest_text_is_diffusers_own(tiny) -> None:
    pipe = tiny()
    pipe.check_inputs("a red circle", None, 64, 64, max_sequence_length=LONGEST_TEXT)
    with pytest.raises(ValueError, match="cannot be greater than"):
        pipe.check_inputs("a red circle", None, 64, 64, max_sequence_length=LONGEST_TEXT + 1)


def test_image_by_its_name_and_size(tmp_path: Path) -> None:
    """As result files have it: two images of one name needn't make as many tokens."""
    Image.new("RGB", (40, 24)).save(tmp_path / "cat.png")
    request = Request("a hat", 64, 48, 2, 2.5, 16, image=tmp_path / "cat.png")
    told = request.to_dict()
    assert (told["image"], told["image_size"]) == ("cat.png", [24, 40])
    assert "image_size" not in Request("a hat", 64, 48, 2, 2.5, 16).to_dict()
