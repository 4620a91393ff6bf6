"""Which kernel computes softmax(q k^T / sqrt(d)) v in the transformer's blocks."""

from __future__ import annotations

from diffusers import DiffusionPipeline
from diffusers.models.attention import AttentionModuleMixin

from recipes import flash_attention_3
from recipes.optimization import Needs, Optimization
from recipes.recipe import Recipe

# What each value is called in diffusers' own dispatcher; the others have a processor of ours.
_DIFFUSERS_BACKENDS = {"native": "native", "cudnn": "_native_cudnn"}
_NEEDS = {
    "native": Needs(),
    "cudnn": Needs(device="cuda", capability=(8, 0)),
    "fa3_fp8": Needs(device="cuda", capability=(9, 0), capability_below=(10, 0), packages=("flash_attn_interface",)),
}


def _apply(pipe: DiffusionPipeline, recipe: Recipe) -> str:
    if recipe.attention in _DIFFUSERS_BACKENDS:
        # Attention by attention: the model's own method sets a default for the whole process besides.
        for module in pipe.transformer.modules():
            if isinstance(module, AttentionModuleMixin):
                module.set_attention_backend(_DIFFUSERS_BACKENDS[recipe.attention])
    else:
        pipe.transformer.set_attn_processor(flash_attention_3.Processor())
    return recipe.attention


OPTIMIZATION = Optimization(
    field="attention",
    needs=lambda recipe: _NEEDS[recipe.attention],
    lossless=lambda recipe: recipe.attention != "fa3_fp8",
    apply=_apply,
)
