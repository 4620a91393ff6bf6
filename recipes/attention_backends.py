"""The attention backends by name: what they compute from bfloat16, and those that can be handed float8 ready-made."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn

from recipes import cudnn_bfloat16
from recipes.attention_processor import Attend

FLOAT8 = ("fa3_fp8", "cudnn_fp8", "triton_fp8", "wgmma_fp8")


@dataclass(frozen=True)
class Float8Attend:
    """Attention over float8_e4m3fn, as `kernels.qkv.qkv_norm_rotary_float8` makes it.

    attend(query, key, value, descales [3, batch, heads]): bfloat16 [batch, tokens, heads, head_dim].
    value_layout: of the values that it takes, by `float8_heads`' name; value_per_head: whether their scale is a head's.
    rows: the same as `attend`, where it gives float8 itself: that, and its float32 scale [batch, tokens, 1].
    beside: the same, where it can write float8 into the first columns of wider rows, of a scale that is given.
    """

    attend: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
    value_layout: str
    value_per_head: bool
    rows: (
        Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]] | None
    ) = None
    beside: (
        Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], None] | None
    ) = None


@dataclass(frozen=True)
class Backend:
    """attend(query, key, value): [batch, tokens, heads, head_dim] each and its result, in the query's dtype."""

    attend: Attend
    float8: Float8Attend | None = None


@functools.cache
def backend(name: str) -> Backend:
    """The backend that a recipe's `attention` names. Imports what it needs."""
    if name == "native":
        return Backend(partial(dispatch_attention_fn, backend=AttentionBackendName.NATIVE))
    if name == "cudnn":
        return Backend(cudnn_bfloat16.cudnn_attention)
    if name in ("fa3", "fa3_fp8"):
        from recipes import flash_attention_3 as fa3

        if name == "fa3":
            return Backend(fa3.flash_attention_3)
        return Backend(fa3.flash_attention_3_fp8, Float8Attend(fa3.flash_attention_3_float8, "by_token", True))
    if name == "cudnn_fp8":
        from recipes import cudnn_attention

        float8 = Float8Attend(
            cudnn_attention.attention_from_float8, "by_token", False, cudnn_attention.rows_from_float8
        )
        return Backend(cudnn_attention.cudnn_fp8, float8)
    if name == "wgmma_fp8":
        from recipes import wgmma_attention as wgmma

        float8 = Float8Attend(
            wgmma.attention_from_float8, "for_wgmma", False, wgmma.rows_from_float8, wgmma.wgmma_attention_beside
        )
        return Backend(wgmma.wgmma_fp8, float8)
    assert name == "triton_fp8", name
    from recipes.kernels import attention

    return Backend(attention.triton_fp8, Float8Attend(attention.attention_float8, "tokens_innermost", True))
