"""What the kernels share that work row by row: one program a row, the row held in registers.

Such a kernel is bound by memory: its time is the bytes that it reads and writes over the bandwidth (3.35 TB/s on an
H100 SXM). A row is one token's features; a scale a row is what `torch._scaled_mm` takes for its left operand.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from recipes.float8_heads import E4M3_MAX, SMALLEST_AMAX


def block_and_warps(columns: int) -> tuple[int, int]:
    """The power of two that a row of `columns` fits in, and the warps that hold it at 16 values a thread or more."""
    block = triton.next_power_of_2(columns)
    return block, max(1, min(16, block // 512))


def rows_to_float8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The reference: x [..., columns] as float8_e4m3fn, and its float32 scale [..., 1]; x = float8 * scale."""
    scale = x.float().abs().amax(dim=-1, keepdim=True).clamp(min=SMALLEST_AMAX) / E4M3_MAX
    return (x.float() / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn), scale


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
def row_scale(amax):
    """The same constants as `rows_to_float8`: a kernel's own have to stand in it."""
    return tl.maximum(amax, 1e-12) / 448.0


@triton.jit
def to_e4m3(x, scale):
    return tl.clamp(x / scale, -448.0, 448.0).to(tl.float8e4nv)


@triton.jit
def normalized(x, mask, columns: tl.constexpr, eps: tl.constexpr):
    """LayerNorm without weights of one row, float32; `mask` marks its `columns` values, the others being 0.

    eps is a constant because Inductor hands a kernel's floats over in double precision, which would spread.
    """
    mean = tl.sum(x, axis=0) / columns
    centred = tl.where(mask, x - mean, 0.0)
    return centred * tl.rsqrt(tl.sum(centred * centred, axis=0) / columns + eps)


@triton.jit
def gelu_tanh(x):
    """GELU's tanh form: 0.5 (1 + tanh(u)) is sigmoid(2 u)."""
    u = 0.7978845608028654 * (x + 0.044715 * x * x * x)
    return x / (1.0 + tl.exp(-2.0 * u))
