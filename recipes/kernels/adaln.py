"""AdaLN in one pass: LayerNorm without weights, then scale and shift from the modulation; in float8 or int8 with a
scale a row.

Per row it reads dim values once and writes dim: 4 bytes a value from bfloat16 to bfloat16, else 3. Unfused, the
float8 form reads the row three times (statistics, amax, cast). Text and image tokens may lie in two tensors and come
out as one, which saves the single blocks' concatenation; or as two, each with its own modulation, which saves the
double blocks a launch for the few text tokens.

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
    store_row_int8,
)


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
    _launch(image, text, (shift, scale), eps, (out,))
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
    out = _empty_float8(image, text)
    _launch(image, text, (shift, scale), eps, out)
    return out


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
    out = _empty_int8(image, text)
    _launch(image, text, (shift, scale), eps, out)
    return out


@triton_op("flux_fast::adaln_float8_streams", mutates_args=())
def adaln_float8_streams(
    image: torch.Tensor,
    text: torch.Tensor,
    image_shift: torch.Tensor,
    image_scale: torch.Tensor,
    text_shift: torch.Tensor,
    text_scale: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`adaln_float8` of two streams in one launch, each with its own modulation; values and scale of the image, then
    those of the text."""
    of_image, of_text = (_empty_float8(x, None) for x in (image, text))
    _launch(image, text, (image_shift, image_scale), eps, of_image, (text_shift, text_scale), of_text)
    return *of_image, *of_text


@triton_op("flux_fast::adaln_int8_streams", mutates_args=())
def adaln_int8_streams(
    image: torch.Tensor,
    text: torch.Tensor,
    image_shift: torch.Tensor,
    image_scale: torch.Tensor,
    text_shift: torch.Tensor,
    text_scale: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`adaln_int8` of two streams in one launch, each with its own modulation; values, scale and norm of the image,
    then those of the text."""
    of_image, of_text = (_empty_int8(x, None) for x in (image, text))
    _launch(image, text, (image_shift, image_scale), eps, of_image, (text_shift, text_scale), of_text)
    return *of_image, *of_text


def _empty(image: torch.Tensor, text: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    batch, tokens, dim = image.shape
    tokens += 0 if text is None else text.shape[1]
    return image.new_empty((batch, tokens, dim), dtype=dtype)


def _empty_float8(image: torch.Tensor, text: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    values = _empty(image, text, torch.float8_e4m3fn)
    return values, values.new_empty((*values.shape[:2], 1), dtype=torch.float32)


def _empty_int8(image: torch.Tensor, text: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    values = _empty(image, text, torch.int8)
    scale, norm = (values.new_empty((*values.shape[:2], 1), dtype=torch.float32) for _ in range(2))
    return values, scale, norm


def _launch(
    image: torch.Tensor,
    text: torch.Tensor | None,
    of_image: tuple[torch.Tensor, torch.Tensor],
    eps: float,
    out: tuple[torch.Tensor, ...],
    of_text: tuple[torch.Tensor, torch.Tensor] | None = None,
    text_out: tuple[torch.Tensor, ...] | None = None,
) -> None:
    """of_image, of_text: shift and scale. *out: values; of float8 scale too, of int8 norm too. Without the text's own
    the image's are of both."""
    of_text = of_text or of_image
    modulation = (*of_text, *of_image)
    names = "shift", "scale", "text_shift", "text_scale"
    check_rows(image=image, text=text, **dict(zip(names, (*of_image, *of_text), strict=True)))
    batch, image_tokens, dim = image.shape
    text_tokens = 0 if text is None else text.shape[1]
    parts, block, warps = row_parts(dim)
    first = image if text is None else text
    # What is left out isn't written to, and any tensor stands for it.
    values, scales, norms = (*out, image, image)[:3]
    text_values, text_scales, text_norms = (*(text_out or ()), image, image, image)[:3]
    wrap_triton(_adaln_kernel)[(text_tokens + image_tokens, batch)](
        first, image, *modulation, text_values, values, text_scales, scales, text_norms, norms,
        text_tokens, text_tokens + image_tokens,
        first.stride(0), first.stride(1), image.stride(0), image.stride(1), *(x.stride(0) for x in modulation),
        EPS=eps, DIM=dim, BLOCK=block, PARTS=parts, HALF_STEPS=0.5 * dim**0.5, STREAMS=text_out is not None,
        FLOAT8=len(out) == 2, INT8=len(out) == 3, num_warps=warps,
    )  # fmt: skip


@triton.jit
def _adaln_kernel(
    text,
    image,
    text_shift,
    text_scale,
    image_shift,
    image_scale,
    text_out,
    out,
    text_out_scale,
    out_scale,
    text_out_norm,
    out_norm,
    text_tokens,
    tokens,
    text_batch,
    text_row,
    image_batch,
    image_row,
    text_shift_row,
    text_scale_row,
    image_shift_row,
    image_scale_row,
    EPS: tl.constexpr,  # noqa: N803
    DIM: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
    PARTS: tl.constexpr,  # noqa: N803
    HALF_STEPS: tl.constexpr,  # noqa: N803
    STREAMS: tl.constexpr,  # noqa: N803
    FLOAT8: tl.constexpr,  # noqa: N803
    INT8: tl.constexpr,  # noqa: N803
):
    token, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row = joint_row(text, image, batch, token, text_tokens, text_batch, text_row, image_batch, image_row)
    shift, scale = image_shift + batch * image_shift_row, image_scale + batch * image_scale_row
    index = batch * tokens + token
    if STREAMS:
        is_text = token < text_tokens
        shift = tl.where(is_text, text_shift + batch * text_shift_row, shift)
        scale = tl.where(is_text, text_scale + batch * text_scale_row, scale)
        of_image = index - (batch + 1) * text_tokens
        index = tl.where(is_text, batch * text_tokens + token, of_image)
        out = tl.where(is_text, text_out, out)
        out_scale = tl.where(is_text, text_out_scale, out_scale)
        out_norm = tl.where(is_text, text_out_norm, out_norm)
    x = load_row(row, BLOCK, PARTS)
    factor = load_row(scale, BLOCK, PARTS)
    offset = load_row(shift, BLOCK, PARTS)
    y = modulated(normalized(x, PARTS, DIM, EPS), factor, offset, PARTS)
    if FLOAT8:
        own_scale = scale_by_norm(y, PARTS)
        tl.store(out_scale + index, own_scale)
        store_row_e4m3(out + index * DIM, y, own_scale, BLOCK, PARTS)
    elif INT8:
        own_scale = int8_scale(row_amax(y, PARTS))
        tl.store(out_scale + index, own_scale)
        tl.store(out_norm + index, (row_norm(y, PARTS) + own_scale * HALF_STEPS) * 1.001)
        store_row_int8(out + index * DIM, y, own_scale, BLOCK, PARTS)
    else:
        store_row(out + index * DIM, y, BLOCK, PARTS)
