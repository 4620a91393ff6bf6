"""GroupNorm, with SiLU behind it, of images with channels innermost: two passes over memory, on all of the GPU.

PyTorch gives each group of each image to one block of threads: 32 for the VAE's one image, on a GPU that runs hundreds.
Here every block takes some pixels of all channels: it sums them up, and what the blocks found is put together (Chan,
Golub and LeVeque 1979, so that a large mean costs no precision). The second pass normalizes.

Source: Wu and He, arXiv 1803.08494; ResnetBlock2D of diffusers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch.library import triton_op, wrap_triton

_TILE = 8192  # values a block holds at a time
_BLOCKS = 528  # of the first pass, at most: four for each of an H100's multiprocessors


def reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    groups: int,
    eps: float,
    silu: bool,
    added: torch.Tensor | None = None,
) -> torch.Tensor:
    """In float32, as `group_norm`."""
    x = x.float() if added is None else x.float() + added.float()[:, None, None]
    normed = torch.nn.functional.group_norm(x, groups, weight.float(), bias.float(), eps)
    return torch.nn.functional.silu(normed) if silu else normed


@triton_op("flux_fast::group_norm", mutates_args=())
def group_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    groups: int,
    eps: float,
    silu: bool,
    added: torch.Tensor | None = None,
) -> torch.Tensor:
    """GroupNorm over x [batch, channels, height, width], then SiLU where asked for.

    weight and bias [channels], and `added`, which is added to x first (such as the bias of the convolution before it,
    which would take a pass of its own); channels a power of two, at most 8192, and groups of them alike. Returns x's
    shape and dtype in channels_last; computed in float32. An x in another memory format is copied first.

    Raises:
        ValueError: channels isn't such a number.
    """
    batch, channels, height, width = x.shape
    if channels & (channels - 1) or channels > _TILE or groups < 1 or channels % groups:
        raise ValueError(
            f"group_norm takes a power of two of channels, at most {_TILE}, in groups of one size, not {channels} in "
            f"{groups}"
        )
    x = x.contiguous(memory_format=torch.channels_last)
    out = torch.empty_like(x)
    pixels, block = height * width, _TILE // channels
    tiles = triton.cdiv(pixels, block * _BLOCKS)  # of each block of the first pass
    splits = triton.cdiv(pixels, block * tiles)
    parts = x.new_empty((2, batch, splits, groups), dtype=torch.float32)  # mean, sum of squared differences to it
    moments = x.new_empty((2, batch, groups), dtype=torch.float32)  # mean, 1 / deviation
    to_x = weight if added is None else added  # one that isn't read
    wrap_triton(_group_norm_moments_kernel)[(splits, batch)](
        x, to_x, parts, pixels, tiles, batch * splits * groups, BLOCK=block, CHANNELS=channels, GROUPS=groups,
        ADDED=added is not None, num_warps=8,
    )  # fmt: skip
    wrap_triton(_group_norm_together_kernel)[(groups, batch)](
        parts, moments, pixels, block * tiles, splits, batch * splits * groups, batch * groups, EPS=eps,
        SPLITS=triton.next_power_of_2(_BLOCKS), CHANNELS=channels, GROUPS=groups,
    )  # fmt: skip
    wrap_triton(_group_norm_normalize_kernel)[(triton.cdiv(pixels, block), batch)](
        x, to_x, weight, bias, moments, out, pixels, batch * groups, BLOCK=block, CHANNELS=channels, GROUPS=groups,
        SILU=silu, ADDED=added is not None, num_warps=8,
    )  # fmt: skip
    return out


@triton.jit
def _group_norm_moments_kernel(
    x,
    added,
    parts,
    pixels,
    tiles,
    part,
    BLOCK: tl.constexpr,  # noqa: N803
    CHANNELS: tl.constexpr,  # noqa: N803
    GROUPS: tl.constexpr,  # noqa: N803
    ADDED: tl.constexpr,  # noqa: N803
):
    """Of tiles * BLOCK pixels, each group's mean and sum of squared differences to it.

    No size of the image is a constexpr: code for a range of sizes would be compiled for one of them.
    """
    split, batch = tl.program_id(0), tl.program_id(1)
    first = split * tiles * BLOCK
    image = x + batch.to(tl.int64) * pixels * CHANNELS
    channels = tl.arange(0, CHANNELS)
    # Sums of differences to some value of each channel, which a large mean can't drown.
    pivot = tl.load(image + first.to(tl.int64) * CHANNELS + channels).to(tl.float32)
    sums = tl.zeros((BLOCK, CHANNELS), tl.float32)
    squares = tl.zeros((BLOCK, CHANNELS), tl.float32)
    for tile in range(tiles):
        pixel = first + tile * BLOCK + tl.arange(0, BLOCK)
        there = (pixel < pixels)[:, None]
        value = tl.load(image + pixel.to(tl.int64)[:, None] * CHANNELS + channels[None, :], there, other=0.0)
        difference = tl.where(there, value.to(tl.float32) - pivot[None, :], 0.0)
        sums += difference
        squares += difference * difference
    count = tl.minimum(pixels - first, tiles * BLOCK).to(tl.float32)
    shift = tl.sum(sums, axis=0) / count
    rest = tl.sum(squares, axis=0) - count * shift * shift
    mean = pivot + shift
    if ADDED:
        mean += tl.load(added + channels).to(tl.float32)
    mean = tl.reshape(mean, (GROUPS, CHANNELS // GROUPS))
    rest = tl.reshape(rest, (GROUPS, CHANNELS // GROUPS))
    of_group = tl.sum(mean, axis=1) / (CHANNELS // GROUPS)
    apart = mean - of_group[:, None]
    rest_of_group = tl.sum(rest + count * apart * apart, axis=1)
    row = (batch * tl.num_programs(0) + split) * GROUPS + tl.arange(0, GROUPS)
    tl.store(parts + row, of_group)
    tl.store(parts + part + row, rest_of_group)


@triton.jit
def _group_norm_together_kernel(
    parts,
    moments,
    pixels,
    of_split,
    splits,
    part,
    moment,
    EPS: tl.constexpr,  # noqa: N803
    SPLITS: tl.constexpr,  # noqa: N803
    CHANNELS: tl.constexpr,  # noqa: N803
    GROUPS: tl.constexpr,  # noqa: N803
):
    """One group of one image: mean and 1 / deviation from those of its splits, of_split pixels each but the last."""
    group, batch = tl.program_id(0), tl.program_id(1)
    split = tl.arange(0, SPLITS)
    there = split < splits
    row = (batch * splits + split) * GROUPS + group
    mean = tl.load(parts + row, there, other=0.0)
    rest = tl.load(parts + part + row, there, other=0.0)
    count = tl.where(there, tl.minimum(pixels - split * of_split, of_split), 0).to(tl.float32)
    together = tl.sum(mean * count, axis=0) / pixels
    apart = mean - together
    variance = tl.sum(rest + count * (CHANNELS // GROUPS) * apart * apart, axis=0) / (pixels * (CHANNELS // GROUPS))
    tl.store(moments + batch * GROUPS + group, together)
    tl.store(moments + moment + batch * GROUPS + group, tl.rsqrt(tl.maximum(variance, 0.0) + EPS))


@triton.jit
def _group_norm_normalize_kernel(
    x,
    added,
    weight,
    bias,
    moments,
    out,
    pixels,
    moment,
    BLOCK: tl.constexpr,  # noqa: N803
    CHANNELS: tl.constexpr,  # noqa: N803
    GROUPS: tl.constexpr,  # noqa: N803
    SILU: tl.constexpr,  # noqa: N803
    ADDED: tl.constexpr,  # noqa: N803
):
    batch = tl.program_id(1)
    pixel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    channels = tl.arange(0, CHANNELS)
    group = batch * GROUPS + channels // (CHANNELS // GROUPS)
    scale = tl.load(moments + moment + group) * tl.load(weight + channels).to(tl.float32)
    shift = tl.load(bias + channels).to(tl.float32) - tl.load(moments + group) * scale
    if ADDED:
        shift += tl.load(added + channels).to(tl.float32) * scale
    there = (pixel < pixels)[:, None]
    at = (batch.to(tl.int64) * pixels + pixel.to(tl.int64))[:, None] * CHANNELS + channels[None, :]
    y = tl.load(x + at, there, other=0.0).to(tl.float32) * scale[None, :] + shift[None, :]
    if SILU:
        y = y * tl.sigmoid(y)
    tl.store(out + at, y.to(out.dtype.element_ty), there)
