"""The image's pixels as bytes on the device, before they are copied to the host.

diffusers copies what the VAE gives and rounds it there: at 1024x1024 some ten milliseconds of one core. The bytes are
the same, and half as many are copied, to pinned memory, which PyTorch keeps for the next image: fresh memory is slow to
touch for the first time.

Source: VaeImageProcessor.postprocess of diffusers.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL import Image

from recipes.optimization import Needs, Optimization
from recipes.recipe import Recipe


class DeviceProcessor:
    """Mixin for VaeImageProcessor."""

    def postprocess(self, image: torch.Tensor, output_type: str = "pil", *args: Any, **kwargs: Any) -> Any:
        """image [batch, 3, height, width], in -1..1 where it is to be denormalized; as the class that it is mixed into.

        For output_type "pil", and else left to that class.
        """
        if output_type != "pil":
            return super().postprocess(image, output_type, *args, **kwargs)  # type: ignore[misc]
        image = super().postprocess(image, "pt", *args, **kwargs)  # type: ignore[misc]
        pixels = (image.permute(0, 2, 3, 1).float() * 255).round().to(torch.uint8)
        on_host = torch.empty(pixels.shape, dtype=torch.uint8, pin_memory=pixels.is_cuda).copy_(pixels)
        return [Image.fromarray(one) for one in on_host.numpy()]


def _apply(pipe: DiffusionPipeline, recipe: Recipe) -> str:
    kind = type(pipe.image_processor)
    pipe.image_processor.__class__ = type(kind.__name__, (DeviceProcessor, kind), {"__module__": kind.__module__})
    return "images rounded to bytes on the device"


OPTIMIZATION = Optimization(
    field="device_postprocessing",
    needs=lambda recipe: Needs(device="cuda"),
    lossless=lambda recipe: True,
    apply=_apply,
)
