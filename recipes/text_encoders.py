"""torch.compile of the text encoders, CLIP and T5, whole graphs only.

A layer is compiled once for all of its kind, and T5's first, which makes the position bias of the others, besides.
(CLIP and T5-XXL, each as one graph, took 38 s to compile.) Prompts come padded to one length, so that nothing is
compiled again. So it is whatever `compile_scope` says: of T5 in float8 as one graph, Inductor makes a kernel that reads
rows back which other warps of it have just written, and waits for none of them (pytorch/pytorch issue 190517,
triton-lang/triton issue 10924); some prompts of a batch of 50 then got embeddings that were far off.

Under execution=aoti they run from packages (`export.text_encoders`), a layer at a time as well.
"""

from __future__ import annotations

import torch
from diffusers import DiffusionPipeline
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from recipes.compile import ROUND_AS_EAGER, inductor_options, with_many_shapes
from recipes.optimization import Needs, Optimization
from recipes.recipe import Recipe


def encoders(pipe: DiffusionPipeline) -> dict[str, nn.Module]:
    """Those that `compiled_text_encoders` is for, by name."""
    return {"CLIP": pipe.text_encoder, "T5": pipe.text_encoder_2}


def _apply(pipe: DiffusionPipeline, recipe: Recipe) -> str:
    if recipe.execution == "aoti":
        return "CLIP's and T5's layers from packages"  # which `execution` puts there
    inductor = {**ROUND_AS_EAGER, **inductor_options(recipe, pipe.device)}  # T5's first layer holds an embedding
    for encoder in encoders(pipe).values():
        for layer in encoder.modules():
            if isinstance(layer, GradientCheckpointingLayer):  # what transformers repeats
                layer.forward = torch.compile(layer.forward, fullgraph=True, dynamic=False, options=inductor)
        encoder.forward = with_many_shapes(encoder.forward)
    return "torch.compile of CLIP's and T5's layers"


OPTIMIZATION = Optimization(
    field="compiled_text_encoders",
    needs=lambda recipe: Needs(compiler=True),
    lossless=lambda recipe: True,
    apply=_apply,
    components=("text_encoder", "text_encoder_2"),
    replaces_forward=lambda recipe: True,
)
