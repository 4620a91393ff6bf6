"""The embedded model as Kontext, and an image for it to edit."""

from __future__ import annotations

from typing import Any

from diffusers import DiffusionPipeline, FluxKontextPipeline
from PIL import Image


def as_kontext(pipe: DiffusionPipeline) -> FluxKontextPipeline:
    pipe = FluxKontextPipeline(**pipe.components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def gradient() -> Image.Image:
    return Image.radial_gradient("L").resize((48, 80)).convert("RGB")


def edit() -> dict[str, Any]:
    """What a call is given to edit an image of its own size."""
    return {"image": gradient(), "max_area": 64 * 64, "_auto_resize": False}
