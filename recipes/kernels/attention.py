"""Attention in float8 (e4m3), forward, not causal: online softmax over blocks of keys, both products on tensor cores.

Query, key and value come with a descale each (batch, head). The probabilities of a block lie in 0..1 relative to the
running maximum and are scaled by 256, half of e4m3's range, which a shift in the exponent does for free; their sum is
taken before they are rounded. The values come with the tokens innermost, which is how Hopper's float8 wgmma reads its
right operand: from [tokens, head_dim] every block would have to be transposed.

FLOPs: 4 x tokens^2 x head_dim a head; 24 heads of 128 at 4608 tokens: 261 GFLOP.

Source: Dao, arXiv 2307.08691 (FlashAttention-2); Shah et al., arXiv 2407.08608 (FlashAttention-3, its float8 part).
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch.library import triton_op, wrap_triton

from recipes.float8_heads import to_float8, tokens_innermost

# Blocks of queries and keys, the order of the two products, warps and stages: what an H100 has registers for.
CONFIGS = [
    triton.Config({"QUERIES": queries, "KEYS": keys, "LATE": late}, num_warps=warps, num_stages=stages)
    for queries, keys, late, warps, stages in (
        (128, 128, False, 8, 3),
        (128, 128, True, 8, 3),
        (128, 64, True, 8, 3),
        (64, 128, False, 4, 2),
        (64, 128, True, 4, 2),
        (64, 64, False, 4, 3),
        (64, 64, True, 4, 3),
    )
]


def worth_trying(configs: list[triton.Config], named: dict[str, Any], **others: Any) -> list[triton.Config]:
    """The configurations that the search tries, of a call's arguments; `triton.autotune` asks for them."""
    short = others["KEY_TOKENS"] % 128 > 0
    # Late with 128 keys fills all 255 registers; beside the code of a short last block it spills 200 bytes or more.
    return [c for c in configs if not (short and c.kwargs["LATE"] and c.kwargs["KEYS"] == 128)]


def reference(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, descales: torch.Tensor, tokens: int
) -> torch.Tensor:
    """In float32, from the same float8 inputs as `attention_float8`; its rounding of probabilities left out."""
    q, k = (x.float() * d[:, None, :, None] for x, d in zip((query, key), descales, strict=False))
    v = value.float()[..., :tokens].permute(0, 3, 1, 2) * descales[2][:, None, :, None]
    weights = torch.einsum("bqhd,bkhd->bhqk", q, k).mul(query.shape[-1] ** -0.5).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v)


@triton_op("flux_fast::attention_float8", mutates_args=())
def attention_float8(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, descales: torch.Tensor
) -> torch.Tensor:
    """softmax(q k^T / sqrt(head_dim)) v in bfloat16, from float8_e4m3fn.

    query [batch, tokens, heads, head_dim] and key [batch, keys, heads, head_dim], head_dim contiguous; value [batch,
    heads, head_dim, at least `keys`, of which those beyond are not read]; descales [3, batch, heads] float32, of
    query, key and value. head_dim is a power of two, 32 or more. Returns [batch, tokens, heads, head_dim], contiguous.
    """
    batch, tokens, heads, head_dim = query.shape
    if any(x.stride(-1) != 1 for x in (query, key, value)) or not descales.is_contiguous():
        raise ValueError("float8 attention reads query, key and value along a contiguous last dimension")
    if head_dim < 32 or head_dim & (head_dim - 1):
        raise ValueError(f"float8 attention takes heads of 32, 64 or 128 values, not of {head_dim}")
    out = query.new_empty((batch, tokens, heads, head_dim), dtype=torch.bfloat16)

    def grid(meta: dict[str, int]) -> tuple[int, int]:
        return triton.cdiv(tokens, meta["QUERIES"]), batch * heads

    wrap_triton(_attention_kernel)[grid](
        query, key, value, descales, out, tokens, heads, batch * heads,
        query.stride(0), query.stride(1), query.stride(2), key.stride(0), key.stride(1), key.stride(2),
        value.stride(0), value.stride(1), value.stride(2),
        SOFTMAX_SCALE=math.log2(math.e) / math.sqrt(head_dim), KEY_TOKENS=key.shape[1], HEAD_DIM=head_dim,
    )  # fmt: skip
    return out


@triton.jit
def _scores(
    q, key, start, key_row,
    KEY_TOKENS: tl.constexpr, KEYS: tl.constexpr, DIM: tl.constexpr, MASKED: tl.constexpr,  # noqa: N803
):  # fmt: skip
    """q k^T [queries, keys] of one block of keys, unscaled; minus infinity beyond the last key."""
    columns, dims = start + tl.arange(0, KEYS), tl.arange(0, DIM)
    place = key + columns[None, :] * key_row + dims[:, None]
    if MASKED:
        is_key = (columns < KEY_TOKENS)[None, :]
        return tl.where(is_key, tl.dot(q, tl.load(place, mask=is_key, other=0.0)), float("-inf"))
    return tl.dot(q, tl.load(place))


@triton.jit
def _softmax(scores, factor, total, maximum):
    """A block's probabilities times 256, unnormalized, what earlier sums have to be multiplied by, and both sums after.

    The sum is that of the probabilities before they are rounded.
    """
    new_maximum = tl.maximum(maximum, tl.max(scores, axis=1) * factor)
    p = tl.exp2(scores * factor - (new_maximum - 8.0)[:, None])
    correction = tl.exp2(maximum - new_maximum)
    return p, correction, total * correction + tl.sum(p, axis=1), new_maximum


@triton.jit
def _add_values(
    acc, p, correction, value, start, value_dim,
    KEY_TOKENS: tl.constexpr, KEYS: tl.constexpr, DIM: tl.constexpr, MASKED: tl.constexpr,  # noqa: N803
):  # fmt: skip
    """acc [queries, head_dim] after a block of keys whose probabilities are p."""
    columns, dims = start + tl.arange(0, KEYS), tl.arange(0, DIM)
    place = value + columns[:, None] + dims[None, :] * value_dim
    v = tl.load(place, mask=(columns < KEY_TOKENS)[:, None], other=0.0) if MASKED else tl.load(place)
    return tl.dot(p.to(tl.float8e4nv), v, acc * correction[:, None])


@triton.autotune(
    CONFIGS,
    key=["tokens", "KEY_TOKENS", "HEAD_DIM", "programs"],
    prune_configs_by={"early_config_prune": worth_trying},
)
@triton.jit
def _attention_kernel(
    query,
    key,
    value,
    descales,
    out,
    tokens,
    heads,
    programs,
    query_batch,
    query_row,
    query_head,
    key_batch,
    key_row,
    key_head,
    value_batch,
    value_head,
    value_dim,
    SOFTMAX_SCALE: tl.constexpr,  # noqa: N803
    KEY_TOKENS: tl.constexpr,  # noqa: N803
    HEAD_DIM: tl.constexpr,  # noqa: N803
    QUERIES: tl.constexpr,  # noqa: N803
    KEYS: tl.constexpr,  # noqa: N803
    LATE: tl.constexpr,  # noqa: N803
):
    program = tl.program_id(1)
    batch, head = (program // heads).to(tl.int64), program % heads
    rows = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    dims = tl.arange(0, HEAD_DIM)
    is_row = (rows < tokens)[:, None]
    place = query + batch * query_batch + head * query_head + rows[:, None] * query_row + dims[None, :]
    q = tl.load(place, mask=is_row, other=0.0)
    key += batch * key_batch + head * key_head
    value += batch * value_batch + head * value_head
    # The scores' descale and the softmax's scale in one factor; log2(e) is in SOFTMAX_SCALE, because of exp2.
    factor = SOFTMAX_SCALE * tl.load(descales + program) * tl.load(descales + programs + program)
    acc = tl.zeros((QUERIES, HEAD_DIM), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    maximum = tl.full((QUERIES,), float("-inf"), tl.float32)
    whole: tl.constexpr = KEY_TOKENS // KEYS * KEYS  # the keys of the blocks that are not short
    short: tl.constexpr = whole < KEY_TOKENS
    if LATE:
        # Each block's values are added after the next block's scores, so that the tensor cores work on them while the
        # next softmax is computed.
        scores = _scores(q, key, 0, key_row, KEY_TOKENS, KEYS, HEAD_DIM, whole == 0)
        p, correction, total, maximum = _softmax(scores, factor, total, maximum)
        for start in range(KEYS, whole, KEYS):
            scores = _scores(q, key, start, key_row, KEY_TOKENS, KEYS, HEAD_DIM, False)
            acc = _add_values(acc, p, correction, value, start - KEYS, value_dim, KEY_TOKENS, KEYS, HEAD_DIM, False)
            p, correction, total, maximum = _softmax(scores, factor, total, maximum)
        if whole > 0:
            if short:
                scores = _scores(q, key, whole, key_row, KEY_TOKENS, KEYS, HEAD_DIM, True)
            acc = _add_values(acc, p, correction, value, whole - KEYS, value_dim, KEY_TOKENS, KEYS, HEAD_DIM, False)
            if short:
                p, correction, total, maximum = _softmax(scores, factor, total, maximum)
    else:
        for start in range(0, whole, KEYS):
            scores = _scores(q, key, start, key_row, KEY_TOKENS, KEYS, HEAD_DIM, False)
            p, correction, total, maximum = _softmax(scores, factor, total, maximum)
            acc = _add_values(acc, p, correction, value, start, value_dim, KEY_TOKENS, KEYS, HEAD_DIM, False)
        if short:
            scores = _scores(q, key, whole, key_row, KEY_TOKENS, KEYS, HEAD_DIM, True)
            p, correction, total, maximum = _softmax(scores, factor, total, maximum)
    if short:
        acc = _add_values(acc, p, correction, value, whole, value_dim, KEY_TOKENS, KEYS, HEAD_DIM, True)
    result = acc * (tl.load(descales + 2 * programs + program) / total)[:, None]
    place = out + ((batch * tokens + rows[:, None]) * heads + head) * HEAD_DIM + dims[None, :]
    tl.store(place, result.to(out.dtype.element_ty), is_row)


def triton_fp8(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Attention over [batch, tokens, heads, head_dim], computed in float8 with a scale for each (batch, head).

    Not causal; returns the query's shape and dtype.
    """
    (q, q_descale), (k, k_descale), (v, v_descale) = (to_float8(x) for x in (query, key, value))
    descales = torch.stack([q_descale, k_descale, v_descale])
    return attention_float8(q, k, tokens_innermost(v), descales).to(query.dtype)
