"""Float8 Linears with GELU by our own kernel for Hopper's tensor cores (kernels/wgmma_linear.cu), as custom ops.

GELU and the cast back to float8 are done before a result leaves the registers. One launch takes two streams, each with
its own layer, so that 512 text tokens don't leave most of the GPU idle.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch

from recipes.kernels.cuda_kernel import CudaKernel, tensor_map

COLUMNS = 192  # of a tile; what comes out in bfloat16 before GELU begins is a multiple of these
_ROWS, _DEPTH, _STAGES, _THREADS = 128, 128, 5, 384  # as in the kernel
_SHARED = _STAGES * (_ROWS + COLUMNS) * _DEPTH + 1024  # rows of both operands by stages, alignment
_PORTIONS = 12  # of what is left to do of a tile, a block of depth each


class Layer(NamedTuple):
    """One stream's input and its layer.

    x [batch, tokens, in features] float8_e4m3fn, scale [batch, tokens, 1] float32, norm [batch, tokens, 1] float32, no
    less than a row's norm; weight [out features, in features] float8_e4m3fn, weight_scale [out features, 1] float32,
    bias [out features] bfloat16, bounds [4] float32, `Float8Linear`'s. All contiguous.
    """

    x: torch.Tensor
    scale: torch.Tensor
    norm: torch.Tensor
    weight: torch.Tensor
    weight_scale: torch.Tensor
    bias: torch.Tensor
    bounds: torch.Tensor


class _Stream(ctypes.Structure):
    _fields_ = (
        *(
            (name, ctypes.c_void_p)
            for name in ("scale", "norm", "weight_scale", "bias", "bounds", "plain", "activated", "activated_scale")
        ),
        ("rows", ctypes.c_longlong),
    )


class _Arguments(ctypes.Structure):
    _fields_ = (
        ("streams", _Stream * 2),
        *((name, ctypes.c_int) for name in ("first", "tall", "wide", "depth", "columns", "plain", "beside")),
    )


def refusal(out_features: int, in_features: int, plain: int) -> str | None:
    """Why the kernel can't compute such a layer, of whose results `plain` stay as they are; None if it can."""
    if in_features % _DEPTH or in_features < 2 * _DEPTH:
        return f"{in_features} in features aren't a multiple of {_DEPTH} from {2 * _DEPTH} on"
    if out_features % 64 or plain % COLUMNS:
        return f"{out_features} out features, of which {plain} without GELU, aren't multiples of 64 and {COLUMNS}"
    return None


def _launch(layers: Sequence[Layer], plain: int, beside: int) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """The kernel over one or two layers: of each what is plain, what is activated, and its scale.

    plain: output features that stay as they are, in bfloat16; the others go through GELU. beside: columns left free in
    front of these.
    """
    columns, depth = layers[0].weight.shape
    if (reason := refusal(columns, depth, plain)) is not None or beside % 16:
        raise ValueError(reason or f"{beside} columns beside the others aren't a multiple of 16")
    arguments = _Arguments(wide=-(-columns // COLUMNS), depth=depth // _DEPTH, columns=columns)
    arguments.plain, arguments.beside = plain, beside
    out = []
    for layer, stream in zip(layers, arguments.streams, strict=False):
        _check(layer, columns, depth)
        results = _empty(layer.x, columns, plain, beside)
        out.append(results)
        for name in ("scale", "norm", "weight_scale", "bias", "bounds"):
            setattr(stream, name, getattr(layer, name).data_ptr())
        stream.plain, stream.activated, stream.activated_scale = (result.data_ptr() for result in results)
        stream.rows = layer.x.shape[0] * layer.x.shape[1]
    tall = [-(-stream.rows // _ROWS) for stream in arguments.streams]
    arguments.first, arguments.tall = tall[0], sum(tall)
    both = (*layers, *layers)[:2]
    rows = [tensor_map(of.x.data_ptr(), (depth, of.x[..., 0].numel()), (depth,), (_DEPTH, _ROWS)) for of in both]
    weights = [_order(of.weight) for of in both]
    device = layers[0].x.device
    blocks = min(arguments.tall * arguments.wide, torch.cuda.get_device_properties(device).multi_processor_count)
    kernel = _kernel(_PORTIONS if arguments.depth > _PORTIONS else 1)
    kernel.launch(device, blocks, _THREADS, (*rows, *weights, arguments))
    return out


@cache
def _kernel(portions: int) -> CudaKernel:
    return CudaKernel("wgmma_linear.cu", "wgmma_linear", "sm_90a", _SHARED, (("PORTIONS", portions),))


def _order(weight: torch.Tensor) -> ctypes.Array[ctypes.c_char]:
    """How TMA reads a weight's rows, 32 at once, so that of each 64 columns of a result a thread has 16 side by side.

    Of 64 columns a thread has 8 i + 2 q and the next, q being its number of four; these are to be 16 q + 2 i and the
    next. So the box goes through the two of a pair, the four threads, and i.
    """
    columns, depth = weight.shape
    sizes = (depth, 2, 4, 8, columns // 64)
    strides = (depth, 16 * depth, 2 * depth, 64 * depth)
    return tensor_map(weight.data_ptr(), sizes, strides, (_DEPTH, 2, 4, 4, 1))


def _check(layer: Layer, columns: int, depth: int) -> None:
    """Raise ValueError unless the kernel reads this layer rightly beside one of these sizes."""
    rows = (*layer.x.shape[:2], 1)
    wanted = {
        "x": (layer.x, (*rows[:2], depth), torch.float8_e4m3fn),
        "scale": (layer.scale, rows, torch.float32),
        "weight": (layer.weight, (columns, depth), torch.float8_e4m3fn),
        "weight_scale": (layer.weight_scale, (columns, 1), torch.float32),
        "bias": (layer.bias, (columns,), torch.bfloat16),
        "norm": (layer.norm, rows, torch.float32),
        "bounds": (layer.bounds, (4,), torch.float32),
    }
    for name, (tensor, shape, dtype) in wanted.items():
        if tensor.shape != shape or tensor.dtype != dtype or not tensor.is_contiguous():
            wanted_text = f"{list(shape)} {dtype}, contiguous"
            raise ValueError(f"{name} is to be {wanted_text}, not {list(tensor.shape)} {tensor.dtype}")
        if name not in ("scale", "norm") and tensor.data_ptr() % 16:
            raise ValueError(f"{name} is read 16 bytes at once and has to begin at a multiple of that")


def _empty(x: torch.Tensor, columns: int, plain: int, beside: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """For x [batch, tokens, in features] what `_launch` gives, to be filled."""
    rows, activated = x.shape[:2], columns - plain
    return (
        x.new_empty((*rows, plain), dtype=torch.bfloat16),
        x.new_empty((*rows, beside + activated)),
        x.new_empty((*rows, 1), dtype=torch.float32),
    )


@torch.library.custom_op("flux_fast::wgmma_gelu_linears", mutates_args=())
def wgmma_gelu_linears(
    x: torch.Tensor,
    scale: torch.Tensor,
    norm: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor,
    bounds: torch.Tensor,
    other_x: torch.Tensor,
    other_scale: torch.Tensor,
    other_norm: torch.Tensor,
    other_weight: torch.Tensor,
    other_weight_scale: torch.Tensor,
    other_bias: torch.Tensor,
    other_bounds: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """GELU(x W^T + b), tanh form, of two streams, as in `Layer`.

    Returns of each [batch, tokens, out features] float8_e4m3fn and its scale [batch, tokens, 1] float32: a bound of the
    row over 448.

    Raises:
        ValueError: a tensor isn't as `Layer` says, or the kernel has no such sizes (`refusal`).
    """
    first = Layer(x, scale, norm, weight, weight_scale, bias, bounds)
    second = Layer(other_x, other_scale, other_norm, other_weight, other_weight_scale, other_bias, other_bounds)
    (_, *one), (_, *other) = _launch([first, second], 0, 0)
    return one[0], one[1], other[0], other[1]


@wgmma_gelu_linears.register_fake
def _(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    (_, *one), (_, *other) = (_empty(x, len(tensors[3]), 0, 0) for x in (tensors[0], tensors[7]))
    return one[0], one[1], other[0], other[1]


@torch.library.custom_op("flux_fast::wgmma_qkv_gelu_linear", mutates_args=())
def wgmma_qkv_gelu_linear(
    x: torch.Tensor,
    scale: torch.Tensor,
    norm: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor,
    bounds: torch.Tensor,
    plain: int,
    beside: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x W^T + b of `plain` features, GELU of the others, as in `Layer`; `plain` is a multiple of 192.

    Returns [batch, tokens, plain] bfloat16; [batch, tokens, beside + out features - plain] float8_e4m3fn, whose first
    `beside` columns are left to the attention; and its scale [batch, tokens, 1] float32, which the attention's values,
    the last third of the plain features, don't exceed in any row either.

    Raises:
        ValueError: a tensor isn't as `Layer` says, or the kernel has no such sizes (`refusal`).
    """
    (results,) = _launch([Layer(x, scale, norm, weight, weight_scale, bias, bounds)], plain, beside)
    return results


@wgmma_qkv_gelu_linear.register_fake
def _(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x, weight, plain, beside = arguments[0], arguments[3], *arguments[7:]
    return _empty(x, len(weight), plain, beside)
