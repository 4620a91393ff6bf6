"""AdaLN in one pass: LayerNorm without weights, then scale and shift from the modulation; in float8 or int8 with a
scale a row.

Per row it reads dim values once and writes dim: 4 bytes a value from bfloat16 to bfloat16, else 3. Unfused, the
float8 form reads the row three times (statistics, amax, cast). A program has several rows, one after the other, for
scale and shift are twice as much to read as a row. Text and image tokens may lie in two tensors and come
out as one, which saves the single blocks' concatenation.

Source: Peebles and Xie, arXiv 2212.09748 (AdaLN); AdaLayerNormZero and AdaLayerNormZeroSingle of diffusers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch.library import triton_op, wrap_triton

from recipes.kernels.rows import (
    check_rows,
    int8_scale,
    joint_row,
    load_row,
    modulated,
    normalized,
    row_amax,
    row_norm,
    row_parts,
    rows_by_norm,
    rows_to_int8,
    scale_by_norm,
    store_row,
    store_row_e4m3,
    to_int8,
)

_ROWS = 4  # a program


def reference(
    image: torch.Tensor, text: torch.Tensor | None, shift: torch.Tensor, scale: torch.Tensor, eps: float
) -> torch.Tensor:
    """In float32, as `adaln`."""
    x = image if text is None else torch.cat([text, image], dim=1)
    normed = torch.nn.functional.layer_norm(x.float(), x.shape[-1:], eps=eps)
    return normed * (1 + scale.float()[:, None]) + shift.float()[:, None]


def reference_float8(
    image: torch.Tensor,
    text: torch.Tensor | None,
    shift: torch.Tensor,
    scale: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    return rows_by_norm(reference(image, text, shift, scale, eps))


def reference_int8(
    image: torch.Tensor,
    text: torch.Tensor | None,
    shift: torch.Tensor,
    scale: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return rows_to_int8(reference(image, text, shift, scale, eps))


@triton_op("flux_fast::adaln", mutates_args=())
def adaln(
    image: torch.Tensor, text: torch.Tensor | None, shift: torch.Tensor, scale: torch.Tensor, eps: float
) -> torch.Tensor:
    """LayerNorm(x) * (1 + scale) + shift over x = text then image tokens.

    image [batch, image tokens, dim], text [batch, text tokens, dim] or None, shift and scale [batch, dim]; the last
    dimension of each contiguous. Returns [batch, tokens, dim], contiguous, of image's dtype; computed in float32.
    """
    out = _empty(image, text, image.dtype)
    _launch(image, text, shift, scale, eps, out, None, None)
    return out


@triton_op("flux_fast::adaln_float8", mutates_args=())
def adaln_float8(
    image: torch.Tensor,
    text: torch.Tensor | None,
    shift: torch.Tensor,
    scale: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`adaln`, as float8_e4m3fn [batch, tokens, dim], of which no row is longer than `quantized_linear.ROW`, and its
    scale [batch, tokens, 1] float32."""
    out = _empty(image, text, torch.float8_e4m3fn)
    out_scale = out.new_empty((*out.shape[:2], 1), dtype=torch.float32)
    _launch(image, text, shift, scale, eps, out, out_scale, None)
    return out, out_scale


@triton_op("flux_fast::adaln_int8", mutates_args=())
def adaln_int8(
    image: torch.Tensor,
    text: torch.Tensor | None,
    shift: torch.Tensor,
    scale: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`adaln`, as int8 [batch, tokens, dim], the largest of each row 127, its scale [batch, tokens, 1] float32, and the
    same of a row's norm, values times scale, or a little more."""
    out = _empty(image, text, torch.int8)
    of_rows = (*out.shape[:2], 1)
    out_scale, out_norm = (out.new_empty(of_rows, dtype=torch.float32) for _ in range(2))
    _launch(image, text, shift, scale, eps, out, out_scale, out_norm)
    return out, out_scale, out_norm


def _empty(image: torch.Tensor, text: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    batch, tokens, dim = image.shape
    tokens += 0 if text is None else text.shape[1]
    return image.new_empty((batch, tokens, dim), dtype=dtype)


def _launch(
    image: torch.Tensor,
    text: torch.Tensor | None,
    shift: torch.Tensor,
    scale: torch.Tensor,
    eps: float,
    out: torch.Tensor,
    out_scale: torch.Tensor | None,
    out_norm: torch.Tensor | None,
) -> None:
    check_rows(image=image, text=text, shift=shift, scale=scale)
    batch, tokens, dim = out.shape
    parts, block, warps = row_parts(dim)
    first = image if text is None else text
    wrap_triton(_adaln_kernel)[(triton.cdiv(tokens, _ROWS), batch)](
        first, image, shift, scale, out,
        image if out_scale is None else out_scale, image if out_norm is None else out_norm,
        0 if text is None else text.shape[1], tokens,
        first.stride(0), first.stride(1), image.stride(0), image.stride(1), shift.stride(0), scale.stride(0),
        EPS=eps, DIM=dim, BLOCK=block, PARTS=parts, ROWS=_ROWS,
        FLOAT8=out_scale is not None and out_norm is None, INT8=out_norm is not None, num_warps=warps,
    )  # fmt: skip


@triton.jit
def _adaln_kernel(
    text,
    image,
    shift,
    scale,
    out,
    out_scale,
    out_norm,
    text_tokens,
    tokens,
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
    ROWS: tl.constexpr,  # noqa: N803
    FLOAT8: tl.constexpr,  # noqa: N803
    INT8: tl.constexpr,  # noqa: N803
):
    batch = tl.program_id(1)
    factor = load_row(scale + batch * scale_row, BLOCK, PARTS)
    offset = load_row(shift + batch * shift_row, BLOCK, PARTS)
    for i in tl.static_range(ROWS):
        token = tl.minimum(tl.program_id(0) * ROWS + i, tokens - 1)  # the last row more than once, if need be
        row = joint_row(text, image, batch, token, text_tokens, text_batch, text_row, image_batch, image_row)
        x = load_row(row, BLOCK, PARTS)
        y = modulated(normalized(x, PARTS, DIM, EPS), factor, offset, PARTS)
        index = batch.to(tl.int64) * tokens + token
        if FLOAT8:
            own_scale = scale_by_norm(y, PARTS)
            tl.store(out_scale + index, own_scale)
            store_row_e4m3(out + index * DIM, y, own_scale, BLOCK, PARTS)
        elif INT8:
            own_scale = int8_scale(row_amax(y, PARTS))
            rounded = to_int8(y, own_scale, PARTS)
            tl.store(out_scale + index, own_scale)
            tl.store(out_norm + index, row_norm(rounded, PARTS) * own_scale * 1.001)
            store_row(out + index * DIM, rounded, BLOCK, PARTS)
        else:
            store_row(out + index * DIM, y, BLOCK, PARTS)
