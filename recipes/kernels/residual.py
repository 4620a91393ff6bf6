"""residual + gate * x, and in the same pass the AdaLN that follows it (in float8 with a scale a row).

Alone it reads two values and writes one; with the AdaLN the row is still in registers, and the norm costs only its
output: 8 bytes a value in all in bfloat16, 7 to float8.

Source: FluxTransformerBlock and FluxSingleTransformerBlock of diffusers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch.library import triton_op, wrap_triton

from recipes.kernels import adaln
from recipes.kernels.rows import (
    check_rows,
    joint_row,
    load_row,
    modulated,
    normalized,
    row_parts,
    rows_by_norm,
    scale_by_norm,
    store_row,
    store_row_e4m3,
)


def reference(
    x: torch.Tensor, gate: torch.Tensor, residual: torch.Tensor, text_residual: torch.Tensor | None
) -> torch.Tensor:
    """In float32, as `gated_residual`."""
    before = residual if text_residual is None else torch.cat([text_residual, residual], dim=1)
    return before.float() + gate.float()[:, None] * x.float()


def reference_adaln(
    x: torch.Tensor,
    gate: torch.Tensor,
    residual: torch.Tensor,
    shift: torch.Tensor,
    scale: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """In float32 but for the residual stream, which is rounded to residual's dtype; as `gated_residual_adaln`."""
    hidden = reference(x, gate, residual, None).to(residual.dtype)
    return hidden, adaln.reference(hidden, None, shift, scale, eps)


def reference_adaln_float8(
    x: torch.Tensor,
    gate: torch.Tensor,
    residual: torch.Tensor,
    shift: torch.Tensor,
    scale: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    hidden, normed = reference_adaln(x, gate, residual, shift, scale, eps)
    return hidden, *rows_by_norm(normed)


@triton_op("flux_fast::gated_residual", mutates_args=())
def gated_residual(
    x: torch.Tensor, gate: torch.Tensor, residual: torch.Tensor, text_residual: torch.Tensor | None
) -> torch.Tensor:
    """residual + gate * x; the residual may lie in two tensors, text tokens before image tokens.

    x [batch, tokens, dim], gate [batch, dim], residual [batch, image tokens, dim], text_residual [batch, text tokens,
    dim] or None; the last dimension of each contiguous. Returns [batch, tokens, dim], contiguous, of residual's dtype;
    computed in float32.
    """
    out = residual.new_empty(x.shape)
    _launch(x, gate, residual, text_residual, out, None, None, 0.0, None, None)
    return out


@triton_op("flux_fast::gated_residual_adaln", mutates_args=())
def gated_residual_adaln(
    x: torch.Tensor,
    gate: torch.Tensor,
    residual: torch.Tensor,
    shift: torch.Tensor,
    scale: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """hidden = residual + gate * x, and LayerNorm(hidden) * (1 + scale) + shift.

    x and residual [batch, tokens, dim], gate, shift and scale [batch, dim]; the last dimension of each contiguous.
    Returns both [batch, tokens, dim], contiguous, of residual's dtype; the norm is that of the rounded hidden.
    """
    hidden = residual.new_empty(x.shape)
    normed = residual.new_empty(x.shape)
    _launch(x, gate, residual, None, hidden, shift, scale, eps, normed, None)
    return hidden, normed


@triton_op("flux_fast::gated_residual_adaln_float8", mutates_args=())
def gated_residual_adaln_float8(
    x: torch.Tensor,
    gate: torch.Tensor,
    residual: torch.Tensor,
    shift: torch.Tensor,
    scale: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`gated_residual_adaln`, its norm as `adaln_float8` gives it: float8_e4m3fn, and scale."""
    hidden = residual.new_empty(x.shape)
    normed = residual.new_empty(x.shape, dtype=torch.float8_e4m3fn)
    normed_scale = residual.new_empty((*x.shape[:2], 1), dtype=torch.float32)
    _launch(x, gate, residual, None, hidden, shift, scale, eps, normed, normed_scale)
    return hidden, normed, normed_scale


def _launch(
    x: torch.Tensor,
    gate: torch.Tensor,
    residual: torch.Tensor,
    text_residual: torch.Tensor | None,
    hidden: torch.Tensor,
    shift: torch.Tensor | None,
    scale: torch.Tensor | None,
    eps: float,
    normed: torch.Tensor | None,
    normed_scale: torch.Tensor | None,
) -> None:
    check_rows(x=x, gate=gate, residual=residual, text_residual=text_residual, shift=shift, scale=scale)
    batch, tokens, dim = x.shape
    parts, block, warps = row_parts(dim)
    text = residual if text_residual is None else text_residual
    shift = gate if shift is None else shift
    scale = gate if scale is None else scale
    wrap_triton(_gated_residual_kernel)[(tokens, batch)](
        x, gate, text, residual, shift, scale, hidden,
        x if normed is None else normed, x if normed_scale is None else normed_scale,
        0 if text_residual is None else text_residual.shape[1], tokens,
        x.stride(0), x.stride(1), gate.stride(0), text.stride(0), text.stride(1),
        residual.stride(0), residual.stride(1), shift.stride(0), scale.stride(0),
        EPS=eps, DIM=dim, BLOCK=block, PARTS=parts, ADALN=normed is not None, FLOAT8=normed_scale is not None,
        num_warps=warps,
    )  # fmt: skip


@triton.jit
def _gated_residual_kernel(
    x,
    gate,
    text,
    image,
    shift,
    scale,
    hidden,
    normed,
    normed_scale,
    text_tokens,
    tokens,
    x_batch,
    x_row,
    gate_row,
    text_batch,
    text_row,
    image_batch,
    image_row,
    shift_row,
    scale_row,
    EPS: tl.constexpr,  # noqa: N803
    DIM: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
    PARTS: tl.constexpr,  # noqa: N803
    ADALN: tl.constexpr,  # noqa: N803
    FLOAT8: tl.constexpr,  # noqa: N803
):
    token, batch = tl.program_id(0), tl.program_id(1)
    row = joint_row(text, image, batch, token, text_tokens, text_batch, text_row, image_batch, image_row)
    before = load_row(row, BLOCK, PARTS)
    update = load_row(x + batch.to(tl.int64) * x_batch + token * x_row, BLOCK, PARTS)
    g = load_row(gate + batch * gate_row, BLOCK, PARTS)
    rounded = ()
    for i in tl.static_range(PARTS):
        rounded = rounded + ((before[i] + g[i] * update[i]).to(hidden.dtype.element_ty).to(tl.float32),)
    index = batch.to(tl.int64) * tokens + token
    store_row(hidden + index * DIM, rounded, BLOCK, PARTS)
    if ADALN:
        factor = load_row(scale + batch * scale_row, BLOCK, PARTS)
        offset = load_row(shift + batch * shift_row, BLOCK, PARTS)
        y = modulated(normalized(rounded, PARTS, DIM, EPS), factor, offset, PARTS)
        if FLOAT8:
            own_scale = scale_by_norm(y, PARTS)
            tl.store(normed_scale + index, own_scale)
            store_row_e4m3(normed + index * DIM, y, own_scale, BLOCK, PARTS)
        else:
            store_row(normed + index * DIM, y, BLOCK, PARTS)
