"""What follows a float8 Linear in that GEMM's epilogue, by our own kernel for Hopper: GELU, and the cast to float8.

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
from utils.errors import UserError


def _apply(pipe: DiffusionPipeline, recipe: Recipe) -> str:
    from recipes import fused_blocks  # needs triton, which only a machine with a GPU has

    transformer = pipe.transformer
    arrange(transformer)
    blocks = [*transformer.transformer_blocks, *transformer.single_transformer_blocks]
    for block in blocks:
        block.kernels = fused_blocks.Epilogues(block.kernels.attention)
    return f"GELU in the GEMMs of {len(blocks)} blocks"


def arrange(transformer: FluxTransformer2DModel) -> None:
    """Let the Linears whose results go through GELU know what these can't exceed.

    Raises:
        UserError: the kernel can't compute a layer of this size.
    """
    for name, plain in _layers(transformer).items():
        linear = transformer.get_submodule(name)
        assert isinstance(linear, Float8Linear)
        features = len(linear.weight)
        plain = features if plain is None else plain
        if reason := wgmma_linear.refusal(features, linear.weight.shape[1], plain):
            raise UserError(f"gemm_epilogues: of {name} {reason}; use gemm_epilogues=false")
        if plain != features:
            linear.bound(plain)


def _layers(transformer: FluxTransformer2DModel) -> dict[str, int | None]:
    """The layers that the kernel computes, and how many of their results don't go through GELU; None: all of them."""
    found: dict[str, int | None] = {}
    for i in range(len(transformer.transformer_blocks)):
        block = f"transformer_blocks.{i}"
        found |= {f"{block}.attn.{name}": None for name in ("to_qkv", "to_added_qkv", "to_out.0", "to_add_out")}
        found |= {f"{block}.{ff}.net.0.proj": 0 for ff in ("ff", "ff_context")}
    for i, single in enumerate(transformer.single_transformer_blocks):
        found[f"single_transformer_blocks.{i}.proj_qkv_mlp"] = 3 * single.attn.inner_dim
    return found


OPTIMIZATION = Optimization(
    field="gemm_epilogues",
    needs=lambda recipe: Needs(
        device="cuda", capability=(9, 0), capability_below=(10, 0), loading_error=cuda_kernel.loading_error
    ),
    lossless=lambda recipe: False,  # float8 keeps its precision under a bound, but reaches less far down
    apply=_apply,
)
