"""Which kernel computes softmax(q k^T / sqrt(d)) v in the transformer's blocks."""

from __future__ import annotations

from dataclasses import replace

from diffusers import DiffusionPipeline

from recipes import attention_backends, flash_attention_3, wgmma_attention
from recipes.attention_processor import Processor
from recipes.kernels import cuda_kernel
from recipes.optimization import Needs, Optimization
from recipes.recipe import Recipe

# What computes in float8 casts what it gets and gives the same back. The kernels in half precision cast nothing:
# FlashAttention-3 raises for float32, and PyTorch's cuDNN attention, asked for by name, reads it as if it were float16
# (native/cudnn/MHA.cpp knows no other dtype than bfloat16 and that).
_FLASH_ATTENTION_3 = Needs(
    device="cuda",
    capability=(9, 0),
    capability_below=(10, 0),
    packages=flash_attention_3.PACKAGES,
    loading_error=flash_attention_3.loading_error,
)
_NEEDS = {
    "native": Needs(),
    "cudnn": Needs(device="cuda", capability=(8, 0), dtype_on_cuda="bfloat16"),
    "fa3": replace(_FLASH_ATTENTION_3, dtype_on_cuda="bfloat16"),
    "fa3_fp8": _FLASH_ATTENTION_3,
    "cudnn_fp8": Needs(device="cuda", capability=(9, 0), packages=("cudnn",)),
    "triton_fp8": Needs(device="cuda", capability=(8, 9), packages=("triton",)),
    "wgmma_fp8": Needs(
        device="cuda", capability=(9, 0), capability_below=(10, 0), loading_error=cuda_kernel.loading_error
    ),
}


def _unfit(recipe: Recipe, pipe: DiffusionPipeline) -> str | None:
    dim = pipe.transformer.config.attention_head_dim
    if recipe.attention != "wgmma_fp8" or dim == wgmma_attention.HEAD_DIM:
        return None
    return f"needs heads of {wgmma_attention.HEAD_DIM} values, this transformer's have {dim}"


def _apply(pipe: DiffusionPipeline, recipe: Recipe) -> str:
    pipe.transformer.set_attn_processor(Processor(attention_backends.backend(recipe.attention).attend))
    return recipe.attention


OPTIMIZATION = Optimization(
    field="attention",
    needs=lambda recipe: _NEEDS[recipe.attention],
    lossless=lambda recipe: recipe.attention not in attention_backends.FLOAT8,
    apply=_apply,
    replaces_attention=lambda recipe: True,
    unfit=_unfit,
)
