"""Step caching: skip most of a denoising step whose first block changes little (diffusers' FirstBlockCache).

Lossy, and outside the ladder, whose rungs compute every step.
"""

from __future__ import annotations

from diffusers import DiffusionPipeline, FirstBlockCacheConfig

from recipes.optimization import Needs, Optimization
from recipes.recipe import Recipe


def _apply(pipe: DiffusionPipeline, recipe: Recipe) -> str:
    assert recipe.cache is not None
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=recipe.cache.threshold))
    return f"first-block cache, threshold {recipe.cache.threshold}"


OPTIMIZATION = Optimization(field="cache", needs=lambda recipe: Needs(), lossless=lambda recipe: False, apply=_apply)
