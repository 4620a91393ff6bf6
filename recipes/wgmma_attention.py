"""Attention in float8 by our own kernel for Hopper's tensor cores (kernels/wgmma_attention.cu), as a custom op."""

from __future__ import annotations

import ctypes
import math
from functools import partial

import torch

from recipes.float8_heads import for_wgmma, to_float8, to_float8_by_norm
from recipes.kernels.cuda_kernel import COUNTERS, CudaKernel, counters, tensor_map

HEAD_DIM = 128
_BLOCK, _STAGES, _THREADS = 128, 4, 384  # as in the kernel
_WARPS = COUNTERS  # that compute: each counts the parts of its rows that are there
_OF_PART = 17 * 4 * 32 * _WARPS  # values in float32, of a part of a tile
_ONES = 8 * _BLOCK  # beside each block of values, by which the tensor cores add up the probabilities
# Keys and values by stages, two blocks of queries, alignment.
_SHARED = (2 * _STAGES + 2) * _BLOCK * HEAD_DIM + _STAGES * _ONES + 1024

_kernel = partial(CudaKernel, "wgmma_attention.cu", "wgmma_attention", "sm_90a", _SHARED)
_KERNELS = {
    dtype: _kernel((("BFLOAT16", int(dtype == torch.bfloat16)),)) for dtype in (torch.bfloat16, torch.float8_e4m3fn)
}


class _Arguments(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("out", "descales", "scales")),
        ("stride", ctypes.c_longlong),
        *((name, ctypes.c_void_p) for name in ("partial", "given")),
        *((name, ctypes.c_int) for name in ("whole", "left", "parts", "tokens", "keys", "heads", "batch")),
        ("scale", ctypes.c_float),
    )


@torch.library.custom_op("flux_fast::wgmma_attention", mutates_args=())
def wgmma_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, descales: torch.Tensor, in_float8: bool
) -> torch.Tensor:
    """softmax(q k^T / sqrt(128)) v from float8_e4m3fn, not causal.

    query [batch, tokens, heads, 128] and key [batch, keys, heads, 128], of which the last dimension is contiguous and
    the other strides are multiples of 16; value as `float8_heads.for_wgmma` lays it out; descales [3, batch, heads]
    float32, of query, key and value. No row of query or key may have been longer than `float8_heads.LONGEST` before it
    was rounded, for scores are float16: `kernels.qkv` and `to_float8_by_norm` see to that. Returns [batch, tokens,
    heads, 128], contiguous, in bfloat16; in_float8: in float8_e4m3fn and the unit of the values' descale.

    Raises:
        ValueError: heads aren't of 128, or a layout is another.
    """
    dtype = torch.float8_e4m3fn if in_float8 else torch.bfloat16
    out = query.new_empty(query.shape, dtype=dtype)
    _launch(query, key, value, descales, out, None)
    return out


@wgmma_attention.register_fake
def _(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, descales: torch.Tensor, in_float8: bool
) -> torch.Tensor:
    return query.new_empty(query.shape, dtype=torch.float8_e4m3fn if in_float8 else torch.bfloat16)


@torch.library.custom_op("flux_fast::wgmma_attention_beside", mutates_args=("rows",))
def wgmma_attention_beside(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    descales: torch.Tensor,
    rows: torch.Tensor,
    scale: torch.Tensor,
) -> None:
    """`wgmma_attention`, written into the first columns of wider rows.

    rows [batch, tokens, heads * 128 + others] float8_e4m3fn and their scale [batch, tokens, 1] float32, contiguous.

    Raises:
        ValueError: as `wgmma_attention`, or rows and scale are others.
    """
    batch, tokens, heads, head_dim = query.shape
    if rows.shape[:2] != (batch, tokens) or rows.shape[2] < heads * head_dim or rows.dtype != torch.float8_e4m3fn:
        raise ValueError(f"rows are to be {heads * head_dim} values in float8 and others, not {tuple(rows.shape)}")
    if scale.shape != (batch, tokens, 1) or scale.dtype != torch.float32 or not scale.is_contiguous():
        raise ValueError(f"a row's scale is float32, [batch, tokens, 1], contiguous, not {tuple(scale.shape)}")
    if not rows.is_contiguous() or rows.shape[2] % 16 or rows.data_ptr() % 16:
        raise ValueError(f"wgmma_attention writes 16 bytes at once: rows have strides {rows.stride()}")
    _launch(query, key, value, descales, rows, scale)


@wgmma_attention_beside.register_fake
def _(*tensors: torch.Tensor) -> None:
    return None


def _launch(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    descales: torch.Tensor,
    out: torch.Tensor,
    scales: torch.Tensor | None,
) -> None:
    """The kernel; a token's heads lie in the first columns of out's rows. scales: theirs, where not the values'."""
    batch, tokens, heads, head_dim = query.shape
    keys = key.shape[1]
    padded = -(-keys // 16) * 16
    if head_dim != HEAD_DIM:
        raise ValueError(f"wgmma_attention takes heads of {HEAD_DIM} values, not of {head_dim}")
    for name, x in (("query", query), ("key", key)):
        if x.stride(-1) != 1 or any(stride % 16 for stride in x.stride()[:-1]) or x.data_ptr() % 16:
            raise ValueError(f"wgmma_attention reads 16 bytes at once: {name} has strides {x.stride()}")
    if value.shape != (batch, heads, HEAD_DIM, padded) or not value.is_contiguous() or not descales.is_contiguous():
        raise ValueError(f"wgmma_attention takes values as for_wgmma lays them out, not {tuple(value.shape)}")
    scale = math.log2(math.e) / math.sqrt(HEAD_DIM)
    arguments = _Arguments(out.data_ptr(), descales.data_ptr(), stride=out.stride(1))
    arguments.scales = None if scales is None else scales.data_ptr()
    arguments.tokens, arguments.keys, arguments.heads, arguments.batch = tokens, keys, heads, batch
    arguments.scale = scale
    by_token = [
        tensor_map(
            x.data_ptr(),
            (HEAD_DIM, x.shape[1], heads, batch),
            (x.stride(1), x.stride(2), x.stride(0)),
            (HEAD_DIM, _BLOCK, 1, 1),
        )
        for x in (query, key)
    ]
    sizes, strides = (padded, HEAD_DIM, batch * heads), (padded, padded * HEAD_DIM)
    by_channel = tensor_map(value.data_ptr(), sizes, strides, (_BLOCK, HEAD_DIM, 1))
    tiles = -(-tokens // _BLOCK) * heads * batch
    blocks = torch.cuda.get_device_properties(query.device).multi_processor_count
    arguments.parts = parts = shared_by(tiles, blocks, -(-keys // _BLOCK))
    arguments.left = tiles % blocks if parts > 1 else 0
    arguments.whole = tiles - arguments.left
    if parts > 1:
        partial = torch.empty(arguments.left * parts * _OF_PART, device=query.device, dtype=torch.float32)
        arguments.partial, arguments.given = partial.data_ptr(), counters(query.device).data_ptr()
    units = arguments.whole + arguments.left * parts
    _KERNELS[out.dtype].launch(query.device, min(units, blocks), _THREADS, (*by_token, by_channel, arguments))


def shared_by(tiles: int, blocks: int, depth: int) -> int:
    """How many parts each of the tiles has that are left for fewer than all `blocks` of threads, of its `depth` blocks
    of keys: at most five, none of less than four, and as many as take the least time, in which what the last of them
    adds up is reckoned as 3 % of a tile for each."""
    left = tiles % blocks
    parts = [n for n in range(1, 6) if depth // n >= 4] if left else []
    return min(parts, key=lambda n: math.ceil(left * n / blocks) / n + 0.03 * n, default=1)


def rows_from_float8(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, descales: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`wgmma_attention` of `kernels.qkv.qkv_norm_rotary_float8`'s results in float8, and its scale [batch, tokens, 1].

    Of the values' descales all are the same: a mean of values can't exceed them, so their own scale fits it.
    """
    out = wgmma_attention(query, key, value, descales, True)
    return out, descales[2, 0, 0].expand(*out.shape[:2], 1).contiguous()


def attention_from_float8(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, descales: torch.Tensor
) -> torch.Tensor:
    """`wgmma_attention` of `kernels.qkv.qkv_norm_rotary_float8`'s results in bfloat16."""
    return wgmma_attention(query, key, value, descales, False)


def wgmma_fp8(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Attention over [batch, tokens, heads, 128], computed in float8 with a scale for each (batch, head).

    Returns the query's shape and dtype.
    """
    (q, q_descale), (k, k_descale), (v, v_descale) = to_float8_by_norm(query), to_float8_by_norm(key), to_float8(value)
    descales = torch.stack([q_descale, k_descale, v_descale])
    return wgmma_attention(q, k, for_wgmma(v), descales, False).to(query.dtype)
