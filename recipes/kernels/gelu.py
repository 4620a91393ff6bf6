"""GELU (tanh form), row scale and cast to float8 in one pass; for the single block beside the attention output.

The single block's output projection takes [attention output, GELU(mlp)]: both parts are written into one buffer with
one scale a row, so that there is no concatenation. Per row: 2 bytes read and 1 written a value; 4608 rows of 15360
are 212 MB, 63 microseconds at 3.35 TB/s.

Source: FluxSingleTransformerBlock and FeedForward of diffusers; Hendrycks and Gimpel, arXiv 1606.08415.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch.library import triton_op, wrap_triton

from recipes.kernels.rows import (
    check_rows,
    gelu_tanh,
    load_row,
    row_amax,
    row_parts,
    row_scale,
    rows_to_float8,
    store_row,
    store_row_e4m3,
)


def reference(
    attention: torch.Tensor | None, hidden: torch.Tensor, attention_scale: torch.Tensor | None = None
) -> torch.Tensor:
    """[attention * attention_scale, GELU(hidden)] along the last dimension, in float32."""
    activated = torch.nn.functional.gelu(hidden.float(), approximate="tanh")
    if attention is None:
        return activated
    scaled = attention.float() if attention_scale is None else attention.float() * attention_scale
    return torch.cat([scaled, activated], dim=-1)


def reference_float8(
    attention: torch.Tensor | None, hidden: torch.Tensor, attention_scale: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    return rows_to_float8(reference(attention, hidden, attention_scale))


@triton_op("flux_fast::concat_gelu", mutates_args=())
def concat_gelu(attention: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """[attention, GELU(hidden)] along the last dimension.

    attention [batch, tokens, dim], hidden [batch, tokens, hidden dim]; the last dimension of each contiguous.
    Returns [batch, tokens, dim + hidden dim], contiguous, of hidden's dtype; computed in float32.
    """
    out = hidden.new_empty((*hidden.shape[:2], attention.shape[2] + hidden.shape[2]))
    _launch(attention, hidden, out, None)
    return out


@triton_op("flux_fast::concat_gelu_float8", mutates_args=())
def concat_gelu_float8(
    attention: torch.Tensor, hidden: torch.Tensor, attention_scale: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`concat_gelu`, as float8_e4m3fn [batch, tokens, dim + hidden dim] and its float32 scale [batch, tokens, 1].

    The attention may be float8 already, with its scale [batch, tokens, 1] float32, contiguous.
    """
    columns = attention.shape[2] + hidden.shape[2]
    out = hidden.new_empty((*hidden.shape[:2], columns), dtype=torch.float8_e4m3fn)
    scale = hidden.new_empty((*hidden.shape[:2], 1), dtype=torch.float32)
    _launch(attention, hidden, out, scale, attention_scale)
    return out, scale


@triton_op("flux_fast::gelu_float8", mutates_args=())
def gelu_float8(hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """GELU(hidden), hidden [batch, tokens, dim], as float8_e4m3fn and its float32 scale [batch, tokens, 1]."""
    out = hidden.new_empty(hidden.shape, dtype=torch.float8_e4m3fn)
    scale = hidden.new_empty((*hidden.shape[:2], 1), dtype=torch.float32)
    _launch(None, hidden, out, scale)
    return out, scale


def _launch(
    attention: torch.Tensor | None,
    hidden: torch.Tensor,
    out: torch.Tensor,
    scale: torch.Tensor | None,
    attention_scale: torch.Tensor | None = None,
) -> None:
    check_rows(attention=attention, hidden=hidden)
    batch, tokens, columns = hidden.shape
    parts, block, warps = row_parts(columns)
    before = hidden if attention is None else attention
    dim = 0 if attention is None else attention.shape[2]
    dim_parts, dim_block, _ = row_parts(dim or 1)
    wrap_triton(_concat_gelu_kernel)[(tokens, batch)](
        before, before if attention_scale is None else attention_scale,
        hidden, out, hidden if scale is None else scale, tokens,
        before.stride(0), before.stride(1), hidden.stride(0), hidden.stride(1),
        DIM=dim, DIM_BLOCK=dim_block, DIM_PARTS=dim_parts, HIDDEN=columns, BLOCK=block, PARTS=parts,
        FLOAT8=scale is not None, SCALED=attention_scale is not None, num_warps=warps,
    )  # fmt: skip


@triton.jit
def _concat_gelu_kernel(
    attention,
    attention_scale,
    hidden,
    out,
    out_scale,
    tokens,
    attention_batch,
    attention_row,
    hidden_batch,
    hidden_row,
    DIM: tl.constexpr,  # noqa: N803
    DIM_BLOCK: tl.constexpr,  # noqa: N803
    DIM_PARTS: tl.constexpr,  # noqa: N803
    HIDDEN: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
    PARTS: tl.constexpr,  # noqa: N803
    FLOAT8: tl.constexpr,  # noqa: N803
    SCALED: tl.constexpr,  # noqa: N803
):
    token, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    index = batch * tokens + token
    row = out + index * (DIM + HIDDEN)
    x = load_row(hidden + batch * hidden_batch + token * hidden_row, BLOCK, PARTS)
    y = ()
    for i in tl.static_range(PARTS):
        y = y + (gelu_tanh(x[i]),)
    if DIM > 0:
        z = load_row(attention + batch * attention_batch + token * attention_row, DIM_BLOCK, DIM_PARTS)
        # Their scale isn't multiplied in: only the largest is needed in y's unit, and one factor does the rest.
        unit = tl.load(attention_scale + index) if SCALED else 1.0
    if FLOAT8:
        amax = row_amax(y, PARTS)
        if DIM > 0:
            amax = tl.maximum(amax, row_amax(z, DIM_PARTS) * unit)
        scale = row_scale(amax)
        tl.store(out_scale + index, scale)
        store_row_e4m3(row + DIM, y, scale, BLOCK, PARTS)
        if DIM > 0:
            store_row_e4m3(row, z, scale / unit, DIM_BLOCK, DIM_PARTS)
    else:
        store_row(row + DIM, y, BLOCK, PARTS)
        if DIM > 0:
            store_row(row, z, DIM_BLOCK, DIM_PARTS)
