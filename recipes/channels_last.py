"""The VAE's weights and activations with channels innermost, the layout in which convolutions need no transposing.

It pays where the convolutions are compiled; eager ones can get slower by it.
"""

from __future__ import annotations

import torch
from diffusers import DiffusionPipeline

from recipes.optimization import Needs, Optimization
from recipes.recipe import Recipe


def _apply(pipe: DiffusionPipeline, recipe: Recipe) -> str:
    pipe.vae.to(memory_format=torch.channels_last)
    return "vae"


OPTIMIZATION = Optimization(
    field="channels_last",
    needs=lambda recipe: Needs(),
    lossless=lambda recipe: True,
    apply=_apply,
    components=("vae",),
)
