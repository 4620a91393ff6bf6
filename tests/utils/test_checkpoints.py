"""Checkpoints by one string: defaults, loading, and what is said when that fails."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import FluxKontextPipeline, FluxPipeline

from tests.denied import denied
from utils import checkpoints, random_weights
from utils.checkpoints import CHECKPOINTS, DEV, KONTEXT, SCHNELL, TINY, defaults, load
from utils.device_memory import free_host_memory
from utils.errors import UsageError, UserError

CPU, META = torch.device("cpu"), torch.device("meta")


def test_defaults_of_known_checkpoints() -> None:
    for name, (steps, guidance, tokens, side) in {
        "tiny": (28, 0.0, 64, 256),
        "black-forest-labs/FLUX.1-schnell": (4, 0.0, 256, 1024),
        "black-forest-labs/FLUX.1-dev": (28, 3.5, 512, 1024),
        "black-forest-labs/FLUX.1-Kontext-dev": (28, 2.5, 512, 1024),
    }.items():
        known = defaults(name)
        assert (known.steps, known.guidance, known.max_sequence_length) == (steps, guidance, tokens)
        assert (known.height, known.width) == (side, side)
    assert defaults("random/flux-schnell") is SCHNELL
    assert defaults("random/flux-dev") is DEV
    assert defaults("random/flux-kontext-dev") is KONTEXT
    assert [name for name, known in CHECKPOINTS.items() if known.takes_image] == [
        "black-forest-labs/FLUX.1-Kontext-dev",
        "random/flux-kontext-dev",
    ]


@pytest.mark.parametrize(
    ("name", "hint"),
    [("random/flux-devv", "did you mean random/flux-dev?"), ("tny", "did you mean tiny?"), ("sdxl", "There are tiny")],
)
def test_unknown_checkpoint(name: str, hint: str) -> None:
    with pytest.raises(UsageError, match="unknown checkpoint") as raised:
        load(name, torch.float32, CPU)
    assert hint in str(raised.value)


def test_folder_that_may_not_be_read(shared: Path) -> None:
    file = shared / "model_index.json"
    file.write_text("{}")
    with (
        denied(file),
        pytest.raises(UserError, match=r"model_index\.json may not be read by you \(Permission denied\)"),
    ):
        defaults(str(shared))


def test_folder_that_is_no_pipeline(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"isn't a diffusers pipeline: model_index.json is missing or damaged"):
        load(str(tmp_path), torch.float32, CPU)
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    with pytest.raises(UsageError, match="holds a StableDiffusionPipeline, not a FluxPipeline"):
        load(str(tmp_path), torch.float32, CPU)
    (tmp_path / "model_index.json").write_text('["FluxPipeline"]')
    with pytest.raises(UsageError, match="isn't a diffusers pipeline"):
        load(str(tmp_path), torch.float32, CPU)
    with pytest.raises(UsageError, match="isn't a diffusers pipeline"):
        load(__file__, torch.float32, CPU)


def test_copy_of_tiny_is_tiny(tiny_copy: Path, tiny: Callable, predict: Callable) -> None:
    assert defaults(str(tiny_copy)) == TINY
    pipe = load(str(tiny_copy), torch.float32, CPU, progress=False)
    assert type(pipe) is FluxPipeline
    assert torch.equal(predict(pipe), predict(tiny()))


def test_copy_of_tiny_as_kontext(kontext: Path) -> None:
    assert defaults(str(kontext)) == checkpoints.Defaults(**{**vars(TINY), "takes_image": True})
    assert type(load(str(kontext), torch.float32, CPU, progress=False)) is FluxKontextPipeline


def test_another_folder_has_schnells_or_devs_defaults(tiny_copy: Path) -> None:
    path = tiny_copy / "transformer" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "num_layers": 1}))
    assert defaults(str(tiny_copy)) == SCHNELL
    path.write_text(json.dumps({**config, "guidance_embeds": True}))
    assert defaults(str(tiny_copy)) == DEV


def weights(folder: Path, part: str) -> Path:
    return next((folder / part).glob("*.safetensors"))


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder", "text_encoder_2"])
@pytest.mark.parametrize("damage", ["truncated", "overwritten", "missing"])
def test_damaged_weights(tiny_copy: Path, part: str, damage: str) -> None:
    path = weights(tiny_copy, part)
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif damage == "overwritten":
        path.write_bytes(b"<html>404 not found</html>" * 100)
    else:
        path.unlink()
    with pytest.raises(UserError) as raised:
        load(str(tiny_copy), torch.float32, CPU, progress=False)
    assert str(raised.value).startswith(f"could not load {tiny_copy}: ")
    assert str(raised.value).endswith("are its files whole?")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder", "text_encoder_2"])
def test_weights_that_lack_a_tensor(tiny_copy: Path, part: str) -> None:
    """A tensor that is missing would be made up at random, and the image would be wrong without a word."""
    from safetensors.torch import load_file, save_file

    path = weights(tiny_copy, part)
    tensors = load_file(path)
    del tensors[sorted(tensors)[-1]]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match="could not load"):
        load(str(tiny_copy), torch.float32, CPU, progress=False)


def test_a_pipeline_knows_what_it_was_loaded_from(tiny: Callable, tiny_copy: Path) -> None:
    assert checkpoints.name(tiny()) == "tiny"
    assert checkpoints.name(load("random/flux-schnell", torch.bfloat16, META)) == "random/flux-schnell"
    assert checkpoints.name(load(str(tiny_copy), torch.float32, CPU, progress=False)) == str(tiny_copy)


def test_a_hub_id_stays_one(tiny_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the Hub's cache, without a network: not the folder in the cache that the files were read from."""
    repository = tmp_path / "models--black-forest-labs--FLUX.1-schnell"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    (repository / "snapshots").mkdir()
    tiny_copy.rename(repository / "snapshots" / ("0" * 40))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    pipe = load("black-forest-labs/FLUX.1-schnell", torch.float32, CPU, progress=False)
    assert pipe.config["_name_or_path"].startswith(str(tmp_path)), "what diffusers knows"
    assert (
        checkpoints.name(pipe) == checkpoints.public_name(checkpoints.name(pipe)) == "black-forest-labs/FLUX.1-schnell"
    )


def test_name_of_a_pipeline_made_otherwise(tiny: Callable, tiny_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = FluxPipeline.from_pretrained(tiny_copy)
    assert checkpoints.name(pipe) == "CHECKPOINT"
    assert checkpoints.name(FluxPipeline(**tiny().components)) == "CHECKPOINT"
    assert checkpoints.name(FluxPipeline.from_pretrained(checkpoints.TINY_FOLDER)) == "tiny"
    pipe.register_to_config(_name_or_path="someone/flux-of-hers")
    assert checkpoints.name(pipe) == "someone/flux-of-hers"
    (tiny_copy.parent / "someone" / "flux-of-hers").mkdir(parents=True)
    monkeypatch.chdir(tiny_copy.parent)
    assert checkpoints.name(pipe) == "CHECKPOINT", "a folder here"


def test_public_name_of_a_folder(tiny_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for known in CHECKPOINTS:
        assert checkpoints.public_name(known) == known
    assert checkpoints.public_name(str(tiny_copy)) == "copy"
    assert checkpoints.public_name(f"{tiny_copy}/gone") == "gone"
    monkeypatch.chdir(tiny_copy)
    assert checkpoints.public_name(".") == checkpoints.public_name("../copy") == "copy"


@pytest.mark.parametrize(
    ("name", "transformer"), [("schnell", 11_891_178_560), ("dev", 11_901_408_320), ("kontext-dev", 11_901_408_320)]
)
def test_random_weights_have_the_published_sizes(name: str, transformer: int) -> None:
    pipe = load(f"random/flux-{name}", torch.bfloat16, META)
    assert type(pipe) is (FluxKontextPipeline if name == "kontext-dev" else FluxPipeline)
    counted = {
        part: sum(p.numel() for p in module.parameters())
        for part, module in pipe.components.items()
        if isinstance(module, torch.nn.Module)
    }
    assert counted == {
        "transformer": transformer,
        "text_encoder_2": 4_762_310_656,
        "text_encoder": 123_060_480,
        "vae": 83_819_683,
    }
    assert {(p.dtype, p.device) for part in counted for p in getattr(pipe, part).parameters()} == {
        (torch.bfloat16, META)
    }
    assert pipe.transformer.config.guidance_embeds == (name != "schnell")
    assert pipe.scheduler.config.use_dynamic_shifting == (name != "schnell")


def test_random_weights_that_the_host_has_no_memory_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "free_host_memory", lambda: 20 * 2**30)
    with pytest.raises(UserError, match=r"^random/flux-dev takes 31 GiB of memory, and 20 are free: use --checkpoint"):
        load("random/flux-dev", torch.bfloat16, CPU)
    assert 2**20 < free_host_memory() < 2**50


def test_random_weights_come_from_their_seed(small_random: None) -> None:
    def build(seed: int) -> dict[str, torch.Tensor]:
        state = torch.random.get_rng_state()
        pipe = random_weights.build(FluxPipeline, True, torch.bfloat16, CPU, seed, checkpoints.TINY_FOLDER)
        assert torch.equal(torch.random.get_rng_state(), state), "the caller's random state is left alone"
        assert torch.get_default_dtype() == torch.float32
        parts = {name: m for name, m in pipe.components.items() if isinstance(m, torch.nn.Module)}
        assert not any(m.training or p.requires_grad for m in parts.values() for p in m.parameters())
        return {f"{part}.{name}": p for part, m in parts.items() for name, p in m.named_parameters()}

    one, same, other = build(0), build(0), build(1)
    assert {p.dtype for p in one.values()} == {torch.bfloat16}
    assert all(torch.equal(one[name], same[name]) for name in one)
    for part in ("transformer", "vae", "text_encoder.", "text_encoder_2"):
        assert any(not torch.equal(one[name], other[name]) for name in one if name.startswith(part)), part
