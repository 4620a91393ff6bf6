"""The elementwise work between the transformer's Linears and attention in fused Triton kernels.

What Inductor leaves apart, because a row's scale has to be known before the row can be cast: AdaLN, GELU and gated
residual, each with the cast to float8; RMSNorm, rotary embedding and the joining of both streams; no concatenation
before the single block's output projection, and, since the kernels read parts of a wider row as well, one GEMM for its
query, key, value and MLP. With Linears and attention in bfloat16 nothing is cast, and
nothing is lost; the double blocks' GELU stays PyTorch's then.
"""

from __future__ import annotations

from types import MethodType

import torch
from diffusers import DiffusionPipeline, FluxTransformer2DModel
from torch import nn

from recipes import float8
from recipes.attention_backends import backend
from recipes.optimization import Needs, Optimization
from recipes.quantized_linear import QuantizedLinear
from recipes.recipe import Recipe
from utils.device_memory import give_back_memory

# The single block's joined projection, and the layers whose rows it has, in their order.
SEPARATE = {"proj_qkv_mlp": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")}


def _apply(pipe: DiffusionPipeline, recipe: Recipe) -> str:
    from recipes import fused_blocks  # needs triton, which only a machine with a GPU has

    transformer = pipe.transformer
    kernels: fused_blocks.Plain | fused_blocks.Float8 = fused_blocks.Plain(backend(recipe.attention))
    if recipe.quantization != "none":
        kernels = fused_blocks.Float8(kernels.attention)
    rearrange(transformer, recipe)
    for blocks, forward in (
        (transformer.transformer_blocks, fused_blocks.double_block),
        (transformer.single_transformer_blocks, fused_blocks.single_block),
    ):
        for block in blocks:
            block.kernels = kernels
            block.forward = MethodType(forward, block)
    return f"{type(kernels).__name__.lower()} kernels in {len(transformer.transformer_blocks)} double and " + (
        f"{len(transformer.single_transformer_blocks)} single blocks"
    )


def rearrange(transformer: FluxTransformer2DModel, recipe: Recipe) -> None:
    """The Linears as the kernels' blocks call them: quantized ones take rows, the single blocks' are one."""
    if recipe.quantization != "none":
        _take_rows(transformer)
    for block in transformer.single_transformer_blocks:
        block.proj_qkv_mlp = _joined(block.attn.to_qkv, block.proj_mlp)
        del block.attn.to_qkv, block.proj_mlp
        give_back_memory(transformer.device)


def _joined(first: nn.Module, second: nn.Module) -> nn.Module:
    """`first`, giving the output features of `second` too, after its own."""
    for name, parameter in list(first.named_parameters()):
        both = torch.cat([parameter.detach(), second.get_parameter(name).detach()])
        setattr(first, name, nn.Parameter(both, requires_grad=False))
    if isinstance(first, nn.Linear):
        first.out_features = len(first.weight)
    return first


def _take_rows(transformer: FluxTransformer2DModel) -> None:
    """Let the quantized Linears take rows that are cast already."""
    names = [name for name, module in transformer.named_modules() if float8.is_quantized(module, name)]
    for name in names:
        owner, _, leaf = name.rpartition(".")
        linear = transformer.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        setattr(transformer.get_submodule(owner), leaf, QuantizedLinear(linear))


OPTIMIZATION = Optimization(
    field="fused_kernels",
    needs=lambda recipe: Needs(device="cuda", capability=(8, 0), packages=("triton",)),
    lossless=lambda recipe: True,
    apply=_apply,
    merges_weights=lambda recipe: True,
    replaces_forward=lambda recipe: True,
    replaces_attention=lambda recipe: True,
)
