"""What follows a quantized Linear in that GEMM's epilogue, by our own kernel for Hopper: GELU, or of query and key
RMSNorm and rotary embedding, and the cast to float8; or the gated residual.

The MLP's hidden activations, query and key are in memory once then, instead of in bfloat16 and in float8. Both streams'
layers run in one launch, for 512 text tokens alone don't fill the GPU; and the single block's attention writes its
result beside the MLP's. A row's scale has to be known before its first value is: it is a bound of them
(kernels/wgmma_linear.cu).
"""

from __future__ import annotations

import torch
from diffusers import DiffusionPipeline, FluxTransformer2DModel
from torch import nn

from recipes import wgmma_linear
from recipes.kernels import cuda_kernel
from recipes.optimization import Needs, Optimization
from recipes.quantized_linear import WEIGHT_ROW, QuantizedLinear
from recipes.recipe import Recipe


def turns(cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """A rotary embedding's table [tokens, head_dim] float32 as the GEMM reads it: of each pair of columns cosine and
    sine, float16. In float32 and twice they are four times as much to read, for each head anew."""
    return torch.stack([cos[:, ::2], sin[:, ::2]], dim=-1).flatten(1).half()


class Turns(nn.Module):
    """A rotary embedding that gives its table as the GEMM reads it."""

    def __init__(self, embed: nn.Module):
        super().__init__()
        self.embed = embed

    def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor]:
        """`turns` of position ids [tokens, 3]."""
        return (turns(*self.embed(ids)),)


def _apply(pipe: DiffusionPipeline, recipe: Recipe) -> str:
    from recipes import fused_blocks  # needs triton, which only a machine with a GPU has

    transformer = pipe.transformer
    arrange(transformer)
    blocks = [*transformer.transformer_blocks, *transformer.single_transformer_blocks]
    for block in blocks:
        block.kernels = fused_blocks.Epilogues(block.kernels.attention, int8=recipe.int8_adaln)
    transformer.pos_embed = Turns(transformer.pos_embed)
    return f"GELU, QK norm, rotary embedding and gated residual in the GEMMs of {len(blocks)} blocks"


def arrange(transformer: FluxTransformer2DModel) -> None:
    """Let the Linears whose results go through GELU, or are an attention's values, know what these can't exceed."""
    bounded: list[tuple[nn.Module, int]] = []  # and the heads that its results begin with
    for block in transformer.transformer_blocks:
        bounded += [(ff.net[0].proj, 0) for ff in (block.ff, block.ff_context)]
        bounded += [(linear, block.attn.heads) for linear in (block.attn.to_qkv, block.attn.to_added_qkv)]
    for block in transformer.single_transformer_blocks:
        bounded.append((block.proj_qkv_mlp, block.attn.heads))
    for name, module in transformer.named_modules():
        if isinstance(module, QuantizedLinear) and module.weight.dtype == torch.float8_e4m3fn:
            assert (module.weight.float().norm(dim=1) < 1.07 * WEIGHT_ROW).all(), "sums of its products are float16"
            module.limit(name)
    for linear, heads in bounded:
        assert isinstance(linear, QuantizedLinear)
        linear.bound(heads, wgmma_linear.HEAD_DIM)


def _unfit(recipe: Recipe, pipe: DiffusionPipeline) -> str | None:
    config = pipe.transformer.config
    dim = config.num_attention_heads * config.attention_head_dim
    heads = config.num_attention_heads
    # Query, key and value; the MLP; a single block's first; the Linears back to the streams, the shallowest.
    layers = ((3 * dim, heads), (4 * dim, 0), (7 * dim, heads), (dim, 0))
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
