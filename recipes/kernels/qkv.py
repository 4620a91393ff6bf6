"""RMSNorm and rotary embedding of query and key, straight from the fused QKV projections of one or both streams.

Text and image tokens come out in one tensor without a concatenation; in float8 with a scale a head where attention
takes it. Per token it reads 3 x heads x head_dim values and writes as many: 57 MB in bfloat16 for 4608 tokens of 24
heads (17 microseconds at 3.35 TB/s), 42 MB to float8 plus 42 for a second look at the values, whose largest has to be
known before they can be scaled. Query and key need no second look: RMSNorm bounds them.

Source: FluxAttnProcessor and apply_rotary_emb of diffusers; Zhang and Sennrich, arXiv 1910.07467 (RMSNorm); Su et al.,
arXiv 2104.09864 (rotary embedding).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch.library import triton_op, wrap_triton

from recipes.float8_heads import E4M3_MAX, LONGEST, SMALLEST_AMAX
from recipes.kernels.rows import check_rows, row_scale, to_e4m3

_VALUE_BLOCK = 64  # tokens a program of the values' cast


def reference(
    image: torch.Tensor,
    text: torch.Tensor | None,
    weights: tuple[torch.Tensor, torch.Tensor],
    text_weights: tuple[torch.Tensor, torch.Tensor] | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    eps: float,
) -> torch.Tensor:
    """Query, key and value in float32, [batch, tokens, 3, heads, head_dim]; weights are those of query and key."""

    def normed(qkv: torch.Tensor, of_stream: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        x = qkv.float()
        parts = [torch.nn.functional.rms_norm(x[:, :, i], x.shape[-1:], of_stream[i].float(), eps) for i in (0, 1)]
        return torch.stack([*parts, x[:, :, 2]], dim=2)

    qkv = normed(image, weights)
    if text is not None and text_weights is not None:
        qkv = torch.cat([normed(text, text_weights), qkv], dim=1)
    even, odd = qkv[:, :, :2].unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([-odd, even], dim=-1).flatten(-2)
    rotated = qkv[:, :, :2] * cos.float()[:, None, None] + turned * sin.float()[:, None, None]
    return torch.cat([rotated, qkv[:, :, 2:]], dim=2)


def reference_descales(
    qkv: torch.Tensor,
    weights: tuple[torch.Tensor, torch.Tensor],
    text_weights: tuple[torch.Tensor, torch.Tensor] | None,
    value_per_head: bool,
) -> torch.Tensor:
    """Descales [3, batch, heads] float32 of `reference`'s result: the bound for query and key, the values' largest."""
    both = [torch.stack([w, *([] if text_weights is None else [text_weights[i]])]) for i, w in enumerate(weights)]
    bounds = [w.float().abs().max() * qkv.shape[-1] ** 0.5 * (E4M3_MAX / LONGEST) for w in both]
    amax = qkv[:, :, 2].abs().amax(dim=(1, 3))
    amax = amax if value_per_head else amax.max().expand_as(amax)
    return torch.stack([*(bound.expand_as(amax) for bound in bounds), amax]).clamp(min=SMALLEST_AMAX) / E4M3_MAX


@triton_op("flux_fast::qk_norm_rotary", mutates_args=())
def qk_norm_rotary(
    image: torch.Tensor,
    text: torch.Tensor | None,
    norm_q: torch.Tensor,
    norm_k: torch.Tensor,
    text_norm_q: torch.Tensor | None,
    text_norm_k: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    eps: float,
) -> torch.Tensor:
    """Query and key after RMSNorm and rotary embedding, text before image tokens; the values too if there is text.

    image [batch, image tokens, 3, heads, head_dim], text the same or None, each token's 3 x heads x head_dim
    contiguous; the norms' weights [head_dim]; cos and sin [tokens, head_dim] float32, each pair of columns one angle's.
    Returns [batch, tokens, 3, heads, head_dim] of image's dtype; without text [batch, tokens, 2, heads, head_dim],
    because the values are in `image` as they are.
    """
    parts = 2 if text is None else 3
    batch, tokens, _, heads, head_dim = image.shape
    tokens += 0 if text is None else text.shape[1]
    out = image.new_empty((batch, tokens, parts, heads, head_dim))
    _launch(image, text, norm_q, norm_k, text_norm_q, text_norm_k, cos, sin, eps, out, None, None)
    return out


@triton_op("flux_fast::qkv_norm_rotary_float8", mutates_args=())
def qkv_norm_rotary_float8(
    image: torch.Tensor,
    text: torch.Tensor | None,
    norm_q: torch.Tensor,
    norm_k: torch.Tensor,
    text_norm_q: torch.Tensor | None,
    text_norm_k: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    eps: float,
    value_layout: str,
    value_per_head: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query, key and value for float8 attention; the arguments are those of `qk_norm_rotary`.

    Returns query and key [batch, tokens, 2, heads, head_dim] and the values, float8_e4m3fn, and the float32 descales
    [3, batch, heads] of query, key and value; the values' is one for all heads unless value_per_head. The values are
    laid out as `float8_heads` names it: by_token [batch, tokens, heads, head_dim]; tokens_innermost and for_wgmma
    [batch, heads, head_dim, tokens rounded up to 16], zero beyond the tokens.

    Raises:
        ValueError: the layout for_wgmma of heads that aren't of 128.
    """
    batch, tokens, _, heads, head_dim = image.shape
    tokens += 0 if text is None else text.shape[1]
    query_key = image.new_empty((batch, tokens, 2, heads, head_dim), dtype=torch.float8_e4m3fn)
    descales = image.new_empty((3, batch, heads), dtype=torch.float32)
    # As integers: positive floats are in the same order, and the atomic maximum is one instruction.
    amax = image.new_zeros((batch, heads) if value_per_head else (1, 1), dtype=torch.int32)
    _launch(image, text, norm_q, norm_k, text_norm_q, text_norm_k, cos, sin, eps, query_key, amax, descales)
    value = _values(image[:, :, 2], None if text is None else text[:, :, 2], amax, descales, value_layout)
    return query_key, value, descales


@triton_op("flux_fast::lay_out_values", mutates_args=())
def lay_out_values(value: torch.Tensor, value_layout: str) -> torch.Tensor:
    """value [batch, tokens, heads, head_dim] float8_e4m3fn, each token's contiguous; laid out as
    `qkv_norm_rotary_float8` does.

    Raises:
        ValueError: the layout for_wgmma of heads that aren't of 128.
    """
    return _values(value.view(torch.uint8), None, None, None, value_layout).view(value.dtype)


def _values(
    image: torch.Tensor,
    text: torch.Tensor | None,
    amax: torch.Tensor | None,
    descales: torch.Tensor | None,
    layout: str,
) -> torch.Tensor:
    """image and text [batch, tokens, heads, head_dim], laid out: with a largest (`amax`) cast to float8, their
    `descales` written; without as they are."""
    batch, tokens, heads, head_dim = image.shape
    if layout == "for_wgmma" and head_dim != 128:
        raise ValueError(f"the layout for_wgmma is that of heads of 128 values, not of {head_dim}")
    tokens += 0 if text is None else text.shape[1]
    padded = tokens if layout == "by_token" else triton.cdiv(tokens, 16) * 16
    sizes = (batch, tokens, heads, head_dim) if layout == "by_token" else (batch, heads, head_dim, padded)
    value = image.new_empty(sizes, dtype=image.dtype if amax is None else torch.float8_e4m3fn)
    by_token = value if layout == "by_token" else value.permute(0, 3, 1, 2)
    first = image if text is None else text
    wrap_triton(_value_to_float8_kernel)[(triton.cdiv(tokens, _VALUE_BLOCK), heads, batch)](
        first, image, image if amax is None else amax, value, image if descales is None else descales,
        tokens - image.shape[1], tokens, padded,
        first.stride(0), first.stride(1), image.stride(0), image.stride(1),
        by_token.stride(0), by_token.stride(1), by_token.stride(2), by_token.stride(3),
        HEADS=heads, HEAD_DIM=head_dim, BLOCK=_VALUE_BLOCK, CAST=amax is not None,
        PER_HEAD=amax is not None and amax.numel() > 1, FOR_WGMMA=layout == "for_wgmma", num_warps=4,
    )  # fmt: skip
    return value


def _launch(
    image: torch.Tensor,
    text: torch.Tensor | None,
    norm_q: torch.Tensor,
    norm_k: torch.Tensor,
    text_norm_q: torch.Tensor | None,
    text_norm_k: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    eps: float,
    out: torch.Tensor,
    value_amax: torch.Tensor | None,
    descales: torch.Tensor | None,
) -> None:
    check_rows(image=image, text=text, cos=cos, sin=sin)
    batch, tokens, parts, heads, head_dim = out.shape
    first = image if text is None else text
    block = min(8, heads & -heads)  # heads that are worked on together; a power of two, and none of them empty
    wrap_triton(_qkv_kernel)[(tokens, batch)](
        first, image, norm_q if text_norm_q is None else text_norm_q, norm_k if text_norm_k is None else text_norm_k,
        norm_q, norm_k, cos, sin, out, cos if value_amax is None else value_amax, cos if descales is None else descales,
        0 if text is None else text.shape[1], tokens,
        first.stride(0), first.stride(1), image.stride(0), image.stride(1), cos.stride(0), sin.stride(0),
        EPS=eps, HEADS=heads, HEADS_BLOCK=block, HEAD_DIM=head_dim, PARTS=parts,
        FLOAT8=descales is not None, PER_HEAD=value_amax is not None and value_amax.numel() > 1,
        OF_LONGEST=E4M3_MAX / LONGEST, num_warps=max(1, block * head_dim // 256),
    )  # fmt: skip


@triton.jit
def _rms_normed_rotated(
    x, weight, cos_even, cos_odd, sin_even, sin_odd,
    EPS: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr,  # noqa: N803
):  # fmt: skip
    """x [heads, dim] float32: RMSNorm a head, then each pair of values turned by its angle."""
    x = x * tl.rsqrt(tl.sum(x * x, axis=1) / DIM + EPS)[:, None] * weight[None, :]
    even, odd = tl.split(tl.reshape(x, (HEADS, DIM // 2, 2)))
    turned = tl.join(even * cos_even - odd * sin_even, odd * cos_odd + even * sin_odd)
    return tl.reshape(turned, (HEADS, DIM))


@triton.jit
def _qkv_kernel(
    text,
    image,
    text_norm_q,
    text_norm_k,
    norm_q,
    norm_k,
    cos,
    sin,
    out,
    value_amax,
    descales,
    text_tokens,
    tokens,
    text_batch,
    text_row,
    image_batch,
    image_row,
    cos_row,
    sin_row,
    EPS: tl.constexpr,  # noqa: N803
    HEADS: tl.constexpr,  # noqa: N803
    HEADS_BLOCK: tl.constexpr,  # noqa: N803
    HEAD_DIM: tl.constexpr,  # noqa: N803
    PARTS: tl.constexpr,  # noqa: N803
    FLOAT8: tl.constexpr,  # noqa: N803
    PER_HEAD: tl.constexpr,  # noqa: N803
    OF_LONGEST: tl.constexpr,  # noqa: N803
):
    token, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    dims = tl.arange(0, HEAD_DIM)
    tile = tl.arange(0, HEADS_BLOCK)[:, None] * HEAD_DIM + dims[None, :]
    is_text = token < text_tokens
    row = tl.where(is_text, text, image) + tl.where(
        is_text, batch * text_batch + token * text_row, batch * image_batch + (token - text_tokens) * image_row
    )
    out_row = out + (batch * tokens + token) * (PARTS * HEADS * HEAD_DIM)
    c = tl.load(cos + token * cos_row + dims).to(tl.float32)
    s = tl.load(sin + token * sin_row + dims).to(tl.float32)
    cos_even, cos_odd = tl.split(tl.reshape(c, (1, HEAD_DIM // 2, 2)))
    sin_even, sin_odd = tl.split(tl.reshape(s, (1, HEAD_DIM // 2, 2)))
    for part in tl.static_range(2):
        image_weight = tl.load((norm_q if part == 0 else norm_k) + dims).to(tl.float32)
        text_weight = tl.load((text_norm_q if part == 0 else text_norm_k) + dims).to(tl.float32)
        weight = tl.where(is_text, text_weight, image_weight)
        if FLOAT8:
            # No normed head is longer than sqrt(head_dim) times the largest weight, turned or not. float8 keeps its
            # precision over 15 powers of two: a scale from a bound costs nothing beside one from the true amax.
            largest = tl.maximum(tl.max(tl.abs(image_weight), axis=0), tl.max(tl.abs(text_weight), axis=0))
            scale = row_scale(largest * tl.sqrt(HEAD_DIM * 1.0) * OF_LONGEST)
            weight *= 1.0 / scale
            if token == 0:
                for head in tl.static_range(HEADS):
                    tl.store(descales + part * tl.num_programs(1) * HEADS + batch * HEADS + head, scale)
        for first in tl.static_range(0, HEADS, HEADS_BLOCK):
            at = (part * HEADS + first) * HEAD_DIM + tile
            x = tl.load(row + at).to(tl.float32)
            y = _rms_normed_rotated(x, weight, cos_even, cos_odd, sin_even, sin_odd, EPS, HEADS_BLOCK, HEAD_DIM)
            tl.store(out_row + at, y.to(out.dtype.element_ty))
    largest_values = tl.zeros((HEADS_BLOCK, HEAD_DIM), tl.float32)
    for first in tl.static_range(0, HEADS, HEADS_BLOCK):
        at = (2 * HEADS + first) * HEAD_DIM + tile
        if FLOAT8:
            x = tl.abs(tl.load(row + at).to(tl.float32))
            if PER_HEAD:
                # As integers: see where the memory for them is made.
                amax = tl.max(x, axis=1).to(tl.int32, bitcast=True)
                heads = first + tl.arange(0, HEADS_BLOCK)
                tl.atomic_max(value_amax + batch * HEADS + heads, amax, sem="relaxed")
            else:
                largest_values = tl.maximum(largest_values, x)
        elif PARTS == 3:
            tl.store(out_row + at, tl.load(row + at))
    if FLOAT8 and not PER_HEAD:
        tl.atomic_max(value_amax, tl.max(largest_values).to(tl.int32, bitcast=True), sem="relaxed")


@triton.jit
def _value_to_float8_kernel(
    text,
    image,
    amax,
    out,
    descales,
    text_tokens,
    tokens,
    padded,
    text_batch,
    text_row,
    image_batch,
    image_row,
    out_batch,
    out_token,
    out_head,
    out_dim,
    HEADS: tl.constexpr,  # noqa: N803
    HEAD_DIM: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
    CAST: tl.constexpr,  # noqa: N803
    PER_HEAD: tl.constexpr,  # noqa: N803
    FOR_WGMMA: tl.constexpr,  # noqa: N803
):
    head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    to_token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    token = to_token
    dims = tl.arange(0, HEAD_DIM)
    to_dim = dims
    if FOR_WGMMA:  # see float8_heads.for_wgmma
        token = token // 16 * 16 + token % 4 // 2 * 8 + token % 16 // 4 * 2 + token % 2
        to_dim = dims % 32 // 2 * 8 + dims // 32 * 2 + dims % 2
    is_text = token < text_tokens
    row = tl.where(is_text, text, image) + tl.where(
        is_text, batch * text_batch + token * text_row, batch * image_batch + (token - text_tokens) * image_row
    )
    is_token = (token < tokens)[:, None]
    x = tl.load(row[:, None] + head * HEAD_DIM + dims[None, :], is_token, other=0)
    if CAST:
        largest = tl.load(amax + batch * HEADS + head if PER_HEAD else amax)
        scale = row_scale(largest.to(tl.float32, bitcast=True))
        if tl.program_id(0) == 0:
            tl.store(descales + (2 * tl.num_programs(2) + batch) * HEADS + head, scale)
        x = to_e4m3(x.to(tl.float32), 1.0 / scale)
    place = batch * out_batch + head * out_head + to_token[:, None] * out_token + to_dim[None, :] * out_dim
    # Ending at a multiple of 16 the mask lets 16 tokens go in one store; at the last token it would write single bytes.
    tl.store(out + place, x, (to_token < padded)[:, None])
