"""The rotary table and the prompt's embedding in the transformer's width, once before the loop.

Neither depends on the step, and diffusers computes both at each one.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DiffusionPipeline

from recipes.hoisting import Hoisted, Remembered, Rotary, end_with_call, hoist, rotary_table
from recipes.optimization import Needs, Optimization
from recipes.recipe import Recipe


def _apply(pipe: DiffusionPipeline, recipe: Recipe) -> str:
    transformer = pipe.transformer

    def embed(states: torch.Tensor, text: torch.Tensor, image: torch.Tensor) -> tuple[torch.Tensor, Rotary]:
        return transformer.context_embedder(states), rotary_table(transformer, text, image)

    hoisted = Hoisted("embeddings", embed)
    # By the embedder's weights too, which may change while a user calls with the same prompt embeddings again.
    embedded = Remembered(lambda states, text, image, *weights: hoisted(states, text, image))

    def replace(arguments: dict[str, Any]) -> dict[str, Any]:
        if "context" in arguments:
            return arguments
        states, text, image = (arguments.pop(name) for name in ("encoder_hidden_states", "txt_ids", "img_ids"))
        context, rotary = embedded(states, text, image, *transformer.context_embedder.parameters())
        return {**arguments, "context": context, "rotary": rotary}

    hoist(transformer, replace, [embedded], [hoisted])
    end_with_call(pipe)
    return "rotary table and context embedding once a call"


OPTIMIZATION = Optimization(
    field="hoisted_embeddings",
    needs=lambda recipe: Needs(),
    lossless=lambda recipe: True,
    apply=_apply,
    replaces_forward=lambda recipe: True,
)
