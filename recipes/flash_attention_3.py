"""FlashAttention-3, in bfloat16 and in float8 (e4m3), as custom ops that torch.compile and torch.export take whole.

Source: Shah et al., arXiv 2407.08608; `flash_attn_func` of the module `flash_attn_interface`, folder `hopper` of
Dao-AILab/flash-attention. Unlike huggingface/flux-fast, which casts unscaled, each (batch, head) gets its own scale,
and its inverse goes to the kernel as descale.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable

import torch

from recipes.float8_heads import to_float8
from utils.errors import UserError, one_line

PACKAGES = ("flash_attn_interface", "kernels")  # either will do
HUB_KERNEL = "kernels-community/flash-attn3"
HUB_VERSION = 1  # the one that diffusers 0.42 loads for its backend _flash_3_hub


def _flash_attn_func() -> Callable[..., torch.Tensor]:
    """The kernel's own function: of the installed module, else of a build for this PyTorch from the hub."""
    if importlib.util.find_spec("flash_attn_interface"):
        from flash_attn_interface import flash_attn_func

        return flash_attn_func
    return _from_hub()


@functools.cache
def _from_hub() -> Callable[..., torch.Tensor]:
    """
    Raises:
        UserError: the hub can't be reached, or has no build for this PyTorch, CUDA and GPU.
    """
    try:
        from kernels import get_kernel

        return get_kernel(HUB_KERNEL, version=HUB_VERSION).flash_attn_func
    except (OSError, ValueError, ImportError) as error:
        raise UserError(
            f"FlashAttention-3 can't be loaded from {HUB_KERNEL} ({one_line(error)}): install flash_attn_interface "
            "(see requirements-gpu.txt) or use attention=cudnn"
        ) from None


@functools.cache
def loading_error() -> str | None:
    """Why the kernel can't be loaded, in one line; None if it can: it is then, once, from the hub if need be."""
    try:
        _flash_attn_func()
    except UserError as error:
        return str(error)
    except (OSError, ImportError) as error:
        return f"flash_attn_interface can't be imported ({one_line(error)}): build it for this PyTorch"
    return None


def _only(out: torch.Tensor | tuple[torch.Tensor, ...]) -> torch.Tensor:
    return out[0] if isinstance(out, tuple) else out  # its first betas returned the log-sum-exp too


@torch.library.custom_op("flux_fast::flash_attention_3", mutates_args=())
def flash_attention_3(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Attention over [batch, tokens, heads, head_dim] in bfloat16, not causal; returns the query's shape and dtype."""
    return _only(_flash_attn_func()(query, key, value)).contiguous()


@torch.library.custom_op("flux_fast::flash_attention_3_float8", mutates_args=())
def flash_attention_3_float8(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, descales: torch.Tensor
) -> torch.Tensor:
    """Attention over float8_e4m3fn [batch, tokens, heads, head_dim], not causal; returns bfloat16 of the query's shape.

    descales [3, batch, heads] float32, of query, key and value.
    """
    q_descale, k_descale, v_descale = descales.unbind(0)
    out = _flash_attn_func()(query, key, value, q_descale=q_descale, k_descale=k_descale, v_descale=v_descale)
    return _only(out).to(torch.bfloat16).contiguous()


@flash_attention_3.register_fake
def _(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return query.new_empty(query.shape)


@flash_attention_3_float8.register_fake
def _(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, descales: torch.Tensor) -> torch.Tensor:
    return query.new_empty(query.shape, dtype=torch.bfloat16)


def flash_attention_3_fp8(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """`flash_attention_3`, computed in float8 with a scale for each (batch, head)."""
    (q, q_descale), (k, k_descale), (v, v_descale) = (to_float8(x) for x in (query, key, value))
    out = flash_attention_3_float8(q, k, v, torch.stack([q_descale, k_descale, v_descale]))
    return out.to(query.dtype)
