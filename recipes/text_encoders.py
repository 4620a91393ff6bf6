"""torch.compile of the text encoders, CLIP and T5, whole graphs only.

Regional as the transformer's, by `compile_scope`: a layer is compiled once for all of its kind, and T5's first, which
makes the position bias of the others, besides. (CLIP and T5-XXL, each as one graph, took 38 s to compile.) Prompts come
padded to one length, so that nothing is compiled again.

Under execution=aoti they stay eager, for nobody who has packages is to wait for a compiler, and packages hold the
transformer and the VAE's decoder alone. With `cuda_graph` they are graphs all the same, which is most of the gain.

T5 in float8 stays eager too, and isn't captured: else the last images of a batch of 50 were wrong more often, for a
reason that isn't known (results/h100-sxm-700w-torch2.11/notes.md).
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from recipes.compile import ROUND_AS_EAGER, compile_forward, inductor_options, with_many_shapes
from recipes.optimization import Needs, Optimization
from recipes.recipe import Recipe


def encoders(pipe: DiffusionPipeline, recipe: Recipe) -> dict[str, nn.Module]:
    """Those that `compiled_text_encoders` is for, by name."""
    found = {"CLIP": pipe.text_encoder, "T5": pipe.text_encoder_2}
    if recipe.float8_text_encoder:
        del found["T5"]
    return found


def _apply(pipe: DiffusionPipeline, recipe: Recipe) -> str:
    names = " and ".join(encoders(pipe, recipe))
    if recipe.execution == "aoti":
        return f"{names} eager: no package holds them, and nothing is compiled at the first call"
    inductor = {**ROUND_AS_EAGER, **inductor_options(recipe, pipe.device)}  # T5's first layer holds an embedding
    options: dict[str, Any] = {"fullgraph": True, "dynamic": False, "options": inductor}
    for encoder in encoders(pipe, recipe).values():
        if recipe.compile_scope == "whole":
            compile_forward(encoder, options)
            continue
        for layer in encoder.modules():
            if isinstance(layer, GradientCheckpointingLayer):  # what transformers repeats
                layer.forward = torch.compile(layer.forward, **options)
        encoder.forward = with_many_shapes(encoder.forward)
    return f"torch.compile of {names}, {recipe.compile_scope}"


OPTIMIZATION = Optimization(
    field="compiled_text_encoders",
    needs=lambda recipe: Needs(compiler=recipe.execution != "aoti"),
    lossless=lambda recipe: True,
    apply=_apply,
    components=("text_encoder", "text_encoder_2"),
    replaces_forward=lambda recipe: recipe.execution != "aoti",
)
