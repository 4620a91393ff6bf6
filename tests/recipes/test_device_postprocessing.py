"""Pixels rounded on the device: the same bytes as diffusers'."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor

import recipes
from recipes import Recipe, RecipeError
from recipes.device_postprocessing import DeviceProcessor


class Processor(DeviceProcessor, VaeImageProcessor):
    pass


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("denormalize", [None, [True, False]])
def test_same_bytes(dtype: torch.dtype, denormalize: list[bool] | None) -> None:
    # All halves between two bytes are among them, where rounding up and rounding to even differ, and values to clip.
    image = torch.linspace(-1.2, 1.2, 2 * 3 * 48 * 32).reshape(2, 3, 48, 32)
    image[0, 0, :, 0] = (torch.arange(48) + 0.5) / 255 * 2 - 1
    image = image.to(dtype)
    if denormalize:
        image = image.clamp(0, 1)
    expected = VaeImageProcessor().postprocess(image, "pil", denormalize)
    got = Processor().postprocess(image, "pil", denormalize)
    assert [one.size for one in got] == [(32, 48)] * 2
    for one, other in zip(got, expected, strict=True):
        assert one.mode == other.mode == "RGB"
        assert np.array_equal(np.asarray(one), np.asarray(other))


def test_other_outputs_are_left_to_diffusers() -> None:
    image = torch.rand(1, 3, 16, 16) * 2 - 1
    for kind in ("pt", "np", "latent"):
        got, expected = (processor.postprocess(image, kind) for processor in (Processor(), VaeImageProcessor()))
        assert type(got) is type(expected)
        assert np.array_equal(np.asarray(got), np.asarray(expected))


def test_refused_without_a_gpu(tiny: Callable) -> None:
    with pytest.raises(RecipeError, match="device_postprocessing=True needs a cuda device, this is cpu"):
        recipes.apply(tiny(), Recipe(device_postprocessing=True))


@pytest.mark.gpu
def test_pipeline_gives_the_same_image(tiny: Callable) -> None:
    pipe = tiny(device=torch.device("cuda"))
    asked = {"prompt": "a red circle", "num_inference_steps": 2, "height": 64, "width": 64}
    images = [pipe(**asked, generator=torch.Generator("cpu").manual_seed(3)).images[0]]
    recipes.apply(pipe, Recipe(device_postprocessing=True))
    images.append(pipe(**asked, generator=torch.Generator("cpu").manual_seed(3)).images[0])
    assert np.array_equal(*map(np.asarray, images))
