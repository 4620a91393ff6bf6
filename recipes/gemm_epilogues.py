"""GELU and its cast to float8 in the epilogue of the GEMM before it, by our own kernel for Hopper.

The MLP's hidden activations are in memory once then, in float8, instead of in bfloat16 and in float8. Both streams'
layers run in one launch, for 512 text tokens alone don't fill the GPU; and the single block's attention writes its
result beside the MLP's. A row's scale has to be known before its first value is: it is a bound of them
(kernels/wgmma_linear.cu).
"""

from __future__ import annotations

from diffusers import DiffusionPipeline, FluxTransformer2DModel

from recipes import wgmma_linear
from recipes.float8_linear import Float8Linear
from recipes.kernels import cuda_kernel
from recipes.optimization import Needs, Optimization
from recipes.recipe import Recipe


def _apply(pipe: DiffusionPipeline, recipe: Recipe) -> str:
    from recipes import fused_blocks  # needs triton, which only a machine with a GPU has

    transformer = pipe.transformer
    arrange(transformer)
    blocks = [*transformer.transformer_blocks, *transformer.single_transformer_blocks]
    for block in blocks:
        block.kernels = fused_blocks.Epilogues(block.kernels.attention)
    return f"GELU in the GEMMs of {len(blocks)} blocks"


def arrange(transformer: FluxTransformer2DModel) -> None:
    """Let the Linears whose results go through GELU know what these can't exceed."""
    of_gelu = [(ff.net[0].proj, 0) for block in transformer.transformer_blocks for ff in (block.ff, block.ff_context)]
    of_gelu += [(block.proj_qkv_mlp, 3 * block.attn.inner_dim) for block in transformer.single_transformer_blocks]
    for linear, plain in of_gelu:
        assert isinstance(linear, Float8Linear)
        linear.bound(plain)


def _unfit(recipe: Recipe, pipe: DiffusionPipeline) -> str | None:
    config = pipe.transformer.config
    dim = config.num_attention_heads * config.attention_head_dim
    layers = ((4 * dim, 0), (7 * dim, 3 * dim))  # the MLP, the single block's first: out features, those without GELU
    reason = next((reason for layer in layers if (reason := wgmma_linear.refusal(layer[0], dim, layer[1]))), None)
    return f"needs other sizes: {reason}" if reason else None


OPTIMIZATION = Optimization(
    field="gemm_epilogues",
    needs=lambda recipe: Needs(
        device="cuda", capability=(9, 0), capability_below=(10, 0), loading_error=cuda_kernel.loading_error
    ),
    lossless=lambda recipe: False,  # float8 keeps its precision under a bound, but reaches less far down
    apply=_apply,
    unfit=_unfit,
)
