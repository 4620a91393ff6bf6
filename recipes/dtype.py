"""Weights and activations in bfloat16: half the bytes, and the tensor cores' own format.

FLUX.1's weights are published in bfloat16, so it loses nothing that the checkpoint had.
"""

from __future__ import annotations

import torch
from diffusers import DiffusionPipeline

from recipes.optimization import Needs, Optimization
from recipes.recipe import Recipe
from utils.components import modules


def torch_dtype(recipe: Recipe) -> torch.dtype:
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[recipe.dtype]


def cast(pipe: DiffusionPipeline, dtype: torch.dtype) -> None:
    """All weights to `dtype`, in place."""
    for module in modules(pipe).values():
        torch.nn.Module.to(module, dtype)  # diffusers' own `to` warns about a list of exceptions, empty for Flux


def _apply(pipe: DiffusionPipeline, recipe: Recipe) -> str:
    cast(pipe, torch_dtype(recipe))
    return recipe.dtype


OPTIMIZATION = Optimization(
    field="dtype", needs=lambda recipe: Needs(), lossless=lambda recipe: True, apply=_apply, always=True
)
