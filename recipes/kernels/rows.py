"""What the kernels share that work row by row, the row held in registers.

Such a kernel is bound by memory: its time is the bytes that it reads and writes over the bandwidth (3.35 TB/s on an
H100 SXM). A row is one token's features; a scale a row is what `torch._scaled_mm` takes for its left operand.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from recipes.float8_heads import E4M3_MAX, SMALLEST_AMAX
from recipes.quantized_linear import INT8_MAX, ROW

# What rounding a row to float8 with its own scale may add to its norm: 2^-4 of each value, little to the smallest.
ROUNDED = 1.065
ADDED_UP = 1.001  # what adding up squares in float32 may lose of a norm


def row_parts(columns: int) -> tuple[int, int, int]:
    """A row of `columns` as parts of a power of two each, none of them partly empty: their number, size, and the warps.

    Triton's blocks are powers of two, and 12288 values in one of 16384 would compute a third more than there is.
    """
    block = columns & -columns
    return columns // block, block, max(1, min(8, block // 256))


def rows_to_float8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The reference: x [..., columns] as float8_e4m3fn, and its float32 scale [..., 1]; x = float8 * scale."""
    scale = x.float().abs().amax(dim=-1, keepdim=True).clamp(min=SMALLEST_AMAX) / E4M3_MAX
    return (x.float() / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn), scale


def rows_by_norm(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The reference: as `rows_to_float8`, such that no row is longer than `quantized_linear.ROW`, rounded too."""
    scale = (x.float().norm(dim=-1, keepdim=True) * ROUNDED).clamp(min=SMALLEST_AMAX) / ROW
    return (x.float() / scale).to(torch.float8_e4m3fn), scale


def rows_to_int8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The reference: x [..., columns] as int8, its float32 scale [..., 1], and a bound of the norm [..., 1] of what was
    rounded: x's norm, and half a step for each value."""
    scale = x.float().abs().amax(dim=-1, keepdim=True).clamp(min=SMALLEST_AMAX) / INT8_MAX
    norm = x.float().norm(dim=-1, keepdim=True) + scale * (0.5 * x.shape[-1] ** 0.5)
    return (x.float() / scale).round().to(torch.int8), scale, norm * ADDED_UP


def check_rows(**tensors: torch.Tensor | None) -> None:
    """Raise ValueError unless the last dimension of each is contiguous, which is how the kernels read rows."""
    for name, x in tensors.items():
        if x is not None and x.stride(-1) != 1:
            raise ValueError(f"{name}: the last dimension has stride {x.stride(-1)}, and it must be contiguous")


@triton.jit
def joint_row(text, image, batch, token, text_tokens, text_batch, text_row, image_batch, image_row):
    """Where a token's row begins in two streams of which the text comes first; strides in elements."""
    is_text = token < text_tokens
    batch = batch.to(tl.int64)
    offset = tl.where(
        is_text, batch * text_batch + token * text_row, batch * image_batch + (token - text_tokens) * image_row
    )
    return tl.where(is_text, text, image) + offset


@triton.jit
def load_row(row, BLOCK: tl.constexpr, PARTS: tl.constexpr):  # noqa: N803
    """A row's parts in float32, as a tuple."""
    parts = ()
    for i in tl.static_range(PARTS):
        parts = parts + (tl.load(row + i * BLOCK + tl.arange(0, BLOCK)).to(tl.float32),)
    return parts


@triton.jit
def store_row(row, parts, BLOCK: tl.constexpr, PARTS: tl.constexpr):  # noqa: N803
    for i in tl.static_range(PARTS):
        tl.store(row + i * BLOCK + tl.arange(0, BLOCK), parts[i].to(row.dtype.element_ty))


@triton.jit
def store_row_e4m3(row, parts, scale, BLOCK: tl.constexpr, PARTS: tl.constexpr):  # noqa: N803
    inverse = 1.0 / scale
    for i in tl.static_range(PARTS):
        tl.store(row + i * BLOCK + tl.arange(0, BLOCK), to_e4m3(parts[i], inverse))


@triton.jit
def row_sum(parts, PARTS: tl.constexpr):  # noqa: N803
    total = parts[0]
    for i in tl.static_range(1, PARTS):
        total += parts[i]
    return tl.sum(total, axis=0)


@triton.jit
def row_amax(parts, PARTS: tl.constexpr):  # noqa: N803
    largest = tl.abs(parts[0])
    for i in tl.static_range(1, PARTS):
        largest = tl.maximum(largest, tl.abs(parts[i]))
    return tl.max(largest, axis=0)


@triton.jit
def row_norm(parts, PARTS: tl.constexpr):  # noqa: N803
    squares = ()
    for i in tl.static_range(PARTS):
        squares = squares + (parts[i] * parts[i],)
    return tl.sqrt(row_sum(squares, PARTS))


@triton.jit
def row_scale(amax):
    """The same constants as `rows_to_float8`, or of a norm `rows_by_norm`: a kernel's own have to stand in it."""
    return tl.maximum(amax, 1e-12) / 448.0


@triton.jit
def scale_by_norm(parts, PARTS: tl.constexpr):  # noqa: N803
    """As `rows_by_norm`, the same constant."""
    return row_scale(row_norm(parts, PARTS) * 1.065)


@triton.jit
def int8_scale(amax):
    """As `rows_to_int8`, the same constants."""
    return tl.maximum(amax, 1e-12) / 127.0


@triton.jit
def store_row_int8(row, parts, scale, BLOCK: tl.constexpr, PARTS: tl.constexpr):  # noqa: N803
    """parts / scale rounded to whole numbers: of one between -2^22 and 2^22, 1.5 x 2^23 more is a float32 whose last
    bits are that number. A conversion would take eight times as long."""
    inverse = 1.0 / scale
    for i in tl.static_range(PARTS):
        rounded = (parts[i] * inverse + 12582912.0).to(tl.int32, bitcast=True)
        tl.store(row + i * BLOCK + tl.arange(0, BLOCK), rounded.to(tl.int8))


@triton.jit
def to_e4m3(x, inverse):
    """x * inverse in float8, where inverse is 1 over a scale that no |x| exceeds 448 times: nothing is to be clamped.

    A division and a clamp a value would be most of such a kernel's instructions.
    """
    return (x * inverse).to(tl.float8e4nv)


@triton.jit
def normalized(parts, PARTS: tl.constexpr, columns: tl.constexpr, eps: tl.constexpr):  # noqa: N803
    """LayerNorm without weights of one row, float32.

    eps is a constant because Inductor hands a kernel's floats over in double precision, which would spread.
    """
    mean = row_sum(parts, PARTS) / columns
    centred = ()
    squares = ()
    for i in tl.static_range(PARTS):
        x = parts[i] - mean
        centred = centred + (x,)
        squares = squares + (x * x,)
    factor = tl.rsqrt(row_sum(squares, PARTS) / columns + eps)
    out = ()
    for i in tl.static_range(PARTS):
        out = out + (centred[i] * factor,)
    return out


@triton.jit
def modulated(parts, factors, offsets, PARTS: tl.constexpr):  # noqa: N803
    """parts * (1 + factors) + offsets."""
    out = ()
    for i in tl.static_range(PARTS):
        out = out + (parts[i] * (1.0 + factors[i]) + offsets[i],)
    return out


@triton.jit
def gelu_tanh(x):
    """GELU's tanh form: 0.5 (1 + tanh(u)) is sigmoid(2 u); -2 u log2(e) is what exp2 takes."""
    return x / (1.0 + tl.exp2(x * (-2.302208198 - 0.1029432397 * x * x)))
