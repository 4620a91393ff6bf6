"""The rotary table and the prompt's embedding in the transformer's width, once before the loop.

Neither depends on the step, and diffusers computes both at each one.
"""

from __future__ import annotations

from typing import Any

from diffusers import DiffusionPipeline

from recipes.hoisting import Remembered, hoist, rotary_table
from recipes.optimization import Needs, Optimization
from recipes.recipe import Recipe


def _apply(pipe: DiffusionPipeline, recipe: Recipe) -> str:
    transformer = pipe.transformer
    context = Remembered(lambda states: transformer.context_embedder(states))
    rotary = Remembered(lambda text, image: rotary_table(transformer, text, image))

    def replace(arguments: dict[str, Any]) -> dict[str, Any]:
        if "context" in arguments:
            return arguments
        states, text, image = (arguments.pop(name) for name in ("encoder_hidden_states", "txt_ids", "img_ids"))
        return {**arguments, "context": context(states), "rotary": rotary(text, image)}

    hoist(transformer, replace, [context])
    return "rotary table and context embedding once a call"


OPTIMIZATION = Optimization(
    field="hoisted_embeddings", needs=lambda recipe: Needs(), lossless=lambda recipe: True, apply=_apply
)
