"""Linears in float8 and int8 by our own kernel for Hopper's tensor cores (kernels/wgmma_linear.cu), as custom ops.

What follows them is done before a result leaves the registers: GELU and the cast back to float8; of query and key
RMSNorm, rotary embedding and the cast; or the gated residual. One launch takes two streams, each with its own layer, so
that 512 text tokens don't leave most of the GPU idle.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true

from recipes.float8_heads import LONGEST
from recipes.kernels.cuda_kernel import CudaKernel, counters, tensor_map
from recipes.quantized_linear import ROW

COLUMNS = 192  # of a tile
HEAD_DIM = 128
_ROWS, _DEPTH, _STAGES, _THREADS = 128, 128, 5, 384  # as in the kernel
_SHARED = _STAGES * (_ROWS + COLUMNS) * _DEPTH + 1024  # rows of both operands by stages, alignment
_CACHED = 16 << 20  # bytes of input rows at once; a Hopper GPU's L2 cache has 50 MB, in two halves
_PIECES = 6  # of what is left to do of a tile, a block of depth each


class Layer(NamedTuple):
    """One stream's input and its layer.

    x [batch, tokens, in features] float8_e4m3fn, no row of it longer than `quantized_linear.ROW`, scale [batch, tokens,
    1] float32; weight [out features, in features] float8_e4m3fn, no row of it longer than
    `quantized_linear.WEIGHT_ROW`, but for rounding, weight_scale [out features, 1] float32, bias [out features]
    bfloat16, bounds [4] float32, `QuantizedLinear`'s, what results in float8 are scaled by: None where they stay in
    bfloat16. Or x and weight int8, of any length, and norm [batch, tokens, 1] float32, no less than that of a row of x
    times scale; then there are bounds. All contiguous.
    """

    x: torch.Tensor
    scale: torch.Tensor
    norm: torch.Tensor | None
    weight: torch.Tensor
    weight_scale: torch.Tensor
    bias: torch.Tensor
    bounds: torch.Tensor | None


class _Stream(ctypes.Structure):
    _fields_ = (
        *(
            (name, ctypes.c_void_p)
            for name in ("scale", "norm", "weight_scale", "bias", "bounds", "activated", "activated_scale")
        ),
        ("rows", ctypes.c_longlong),
    )


class _Heads(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("norm_q", "norm_k", "turns")),
        *((name, ctypes.c_int) for name in ("first", "tokens")),
    )


class _Update(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("text", "image", "gate", "out")),
        *((name, ctypes.c_longlong) for name in ("text_batch", "text_row", "image_batch", "image_row", "gate_batch")),
        *((name, ctypes.c_int) for name in ("text_tokens", "tokens")),
    )


class _Arguments(ctypes.Structure):
    _fields_ = (
        ("streams", _Stream * 2),
        ("of_heads", _Heads * 2),
        ("updates", _Update * 2),
        *((name, ctypes.c_void_p) for name in ("query_key", "value", "descales")),
        *((name, ctypes.c_int) for name in ("heads", "tokens", "batch", "laid_out")),
        ("eps", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in ("partial", "given")),
        *((name, ctypes.c_int) for name in ("first", "tall", "wide", "group")),
        *((name, ctypes.c_int) for name in ("whole", "left", "parts", "depth", "columns")),
    )


class Attention(NamedTuple):
    """What becomes of query, key and value, the layers' first features, three times `heads` of 128.

    norms: of each stream the weights of query's and key's RMSNorm [128] bfloat16; turns [tokens of all streams, 128]
    float16, those of the last stream first: for each pair of columns, which are turned by one angle, its cosine and
    sine. laid_out: the values come as `float8_heads.for_wgmma` lays them out, and not by token.
    """

    norms: Sequence[tuple[torch.Tensor, torch.Tensor]]
    turns: torch.Tensor
    eps: float
    heads: int
    laid_out: bool


class Update(NamedTuple):
    """What a stream was before, and what is added to it: the Linear's result times a gate.

    gate [batch, out features], residual [batch, image tokens, out features], text_residual the same of the text's
    tokens, which come first, or None; bfloat16, the last dimension of each contiguous.
    """

    gate: torch.Tensor
    residual: torch.Tensor
    text_residual: torch.Tensor | None


def refusal(out_features: int, in_features: int, heads: int) -> str | None:
    """Why the kernel can't compute such a layer, whose results begin with query, key and value of `heads`; None if it
    can."""
    if in_features % _DEPTH or in_features < 2 * _DEPTH:
        return f"{in_features} in features aren't a multiple of {_DEPTH} from {2 * _DEPTH} on"
    if out_features % 64 or out_features < 3 * heads * HEAD_DIM:
        return f"{out_features} out features aren't a multiple of 64, or fewer than {heads} heads of {HEAD_DIM} have"
    return None


def _launch(
    layers: Sequence[Layer], attention: Attention | None
) -> tuple[tuple[torch.Tensor, ...], list[tuple[torch.Tensor, torch.Tensor]]]:
    """The kernel over one or two layers: `_qkv` of both, if there is an attention; of each what is activated, and its
    scale."""
    columns = len(layers[0].weight)
    heads = 0 if attention is None else attention.heads
    arguments = _arguments(layers, heads)
    out = [_activated(layer.x, columns, heads) for layer in layers]
    for results, stream in zip(out, arguments.streams, strict=False):
        stream.activated, stream.activated_scale = (result.data_ptr() for result in results)
    qkv = () if attention is None else _attend(arguments, [layer.x for layer in layers], attention)
    _run(layers, arguments, update=False)
    return qkv, out


def _launch_updates(layers: Sequence[Layer], updates: Sequence[Update]) -> list[torch.Tensor]:
    """The kernel over one or two layers: what each stream is afterwards."""
    arguments = _arguments(layers, 0)
    out = []
    for layer, update, own in zip(layers, updates, arguments.updates, strict=False):
        result = _updated(layer.x, layer.weight)
        _check_update(update, result)
        text = update.residual if update.text_residual is None else update.text_residual
        own.text_tokens = 0 if update.text_residual is None else text.shape[1]
        own.tokens = result.shape[1]
        own.text, own.image, own.gate, own.out = (x.data_ptr() for x in (text, update.residual, update.gate, result))
        own.text_batch, own.text_row = text.stride()[:2]
        own.image_batch, own.image_row = update.residual.stride()[:2]
        own.gate_batch = update.gate.stride(0)
        out.append(result)
    _run(layers, arguments, update=True)
    return out


def _arguments(layers: Sequence[Layer], heads: int) -> _Arguments:
    """What the kernel is told of layers whose results begin with query, key and value of `heads`, checked."""
    columns, depth = layers[0].weight.shape
    if (reason := refusal(columns, depth, heads)) is not None:
        raise ValueError(reason)
    if len(dtypes := {layer.x.dtype for layer in layers}) > 1:
        raise ValueError(f"the streams are to be of one dtype, not {' and '.join(sorted(map(str, dtypes)))}")
    arguments = _Arguments(wide=-(-columns // COLUMNS), depth=depth // _DEPTH, columns=columns)
    for layer, stream in zip(layers, arguments.streams, strict=False):
        _check(layer, columns, depth)
        for name in ("scale", "norm", "weight_scale", "bias", "bounds"):
            tensor = getattr(layer, name)
            setattr(stream, name, None if tensor is None else tensor.data_ptr())
        stream.rows = layer.x.shape[0] * layer.x.shape[1]
    tall = [-(-stream.rows // _ROWS) for stream in arguments.streams]
    arguments.first, arguments.tall = tall[0], sum(tall)
    arguments.group = rows_at_once(arguments.tall, depth)
    return arguments


def _run(layers: Sequence[Layer], arguments: _Arguments, update: bool) -> None:
    depth = layers[0].weight.shape[1]
    both = (*layers, *layers)[:2]
    rows = [tensor_map(of.x.data_ptr(), (depth, of.x[..., 0].numel()), (depth,), (_DEPTH, _ROWS)) for of in both]
    weights = [_order(of.weight) for of in both]
    device, tiles = layers[0].x.device, arguments.tall * arguments.wide
    blocks = torch.cuda.get_device_properties(device).multi_processor_count
    arguments.parts = parts = shared_by(tiles, blocks, arguments.depth) if update else 1
    arguments.left = tiles % blocks if parts > 1 else 0
    arguments.whole = tiles - arguments.left
    if parts > 1:
        sums = arguments.left * (parts - 1) * _ROWS * COLUMNS
        partial = torch.empty(sums, device=device, dtype=torch.float16)
        arguments.partial, arguments.given = partial.data_ptr(), counters(device).data_ptr()
    units = arguments.whole + arguments.left * parts
    kernel = _kernel(arguments.depth > _PIECES, update, layers[0].x.dtype == torch.int8)
    kernel.launch(device, min(units, blocks), _THREADS, (*rows, *weights, arguments))


def shared_by(tiles: int, blocks: int, depth: int) -> int:
    """How many of `blocks` of threads share each of the tiles that are left for fewer than all of them, each some of
    the `depth` blocks of depth. The first adds up what the others leave in memory: at most four, none of less than
    16 blocks of depth, which would cost more than it gives."""
    left = tiles % blocks
    return max(1, min(blocks // left, depth // 16, 4)) if left else 1


def _attend(arguments: _Arguments, streams: list[torch.Tensor], attention: Attention) -> tuple[torch.Tensor, ...]:
    """Put an attention into the kernel's arguments; `_qkv`, to be filled."""
    if len({x.shape[0] for x in streams}) > 1:
        raise ValueError(f"the streams' batches differ: {[x.shape[0] for x in streams]}")
    if attention.laid_out and not lays_out(*(x.shape[1] for x in streams)):
        raise ValueError(f"values of {[x.shape[1] for x in streams]} tokens aren't laid out: see lays_out")
    out = _qkv(streams, attention.heads, attention.laid_out)
    arguments.query_key, arguments.value, arguments.descales = (tensor.data_ptr() for tensor in out)
    arguments.batch, arguments.tokens = out[0].shape[:2]
    arguments.laid_out = attention.laid_out
    arguments.heads, arguments.eps = attention.heads, attention.eps
    _check_tensors(turns=(attention.turns, (arguments.tokens, HEAD_DIM), torch.float16))
    first = arguments.tokens
    for x, (norm_q, norm_k), own in zip(streams, attention.norms, arguments.of_heads, strict=False):
        of_norm = (HEAD_DIM,), torch.bfloat16
        _check_tensors(norm_q=(norm_q, *of_norm), norm_k=(norm_k, *of_norm))
        own.tokens = x.shape[1]
        own.first = first = first - own.tokens
        own.norm_q, own.norm_k = norm_q.data_ptr(), norm_k.data_ptr()
        own.turns = attention.turns[first:].data_ptr()
    return out


def lays_out(*tokens: int) -> bool:
    """Whether the kernel lays out the values of streams of so many tokens: a warp's 16 rows have to be one image's. Of
    sizes that aren't known, as within a range of them, it doesn't."""
    return all(statically_known_true(n % 16 == 0) for n in tokens)


def rows_at_once(tall: int, depth: int) -> int:
    """Of `tall` tiles of rows of `depth` bytes how many are multiplied by all columns before the next: such that they
    stay in the L2 cache, and in groups as large as each other."""
    groups = -(-tall // max(1, _CACHED // (_ROWS * depth)))
    return -(-tall // groups)


@cache
def _kernel(deep: bool, update: bool, int8: bool) -> CudaKernel:
    flags = (("DEEP", int(deep)), ("UPDATE", int(update)), ("INT8", int(int8)))
    defines = (*flags, ("LONGEST", LONGEST), ("ROW", ROW))
    name = "wgmma_linear_int8" if int8 else "wgmma_linear"  # traces tell which it was
    return CudaKernel("wgmma_linear.cu", name, "sm_90a", _SHARED, defines)


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
    dtype = torch.float8_e4m3fn if layer.norm is None else torch.int8
    _check_tensors(
        x=(layer.x, (*rows[:2], depth), dtype),
        scale=(layer.scale, rows, torch.float32),
        weight=(layer.weight, (columns, depth), dtype),
        weight_scale=(layer.weight_scale, (columns, 1), torch.float32),
        bias=(layer.bias, (columns,), torch.bfloat16),
    )
    if layer.norm is not None:
        _check_tensors(norm=(layer.norm, rows, torch.float32))
    if layer.bounds is not None:
        _check_tensors(bounds=(layer.bounds, (4,), torch.float32))


def _check_update(update: Update, result: torch.Tensor) -> None:
    """Raise ValueError unless the kernel reads this update of a result [batch, tokens, columns] rightly."""
    batch, tokens, columns = result.shape
    text = 0 if update.text_residual is None else update.text_residual.shape[1]
    wanted = {
        "gate": (batch, columns),
        "residual": (batch, tokens - text, columns),
        "text_residual": (batch, text, columns),
    }
    for name, tensor in update._asdict().items():
        if tensor is None:
            continue
        if tensor.shape != wanted[name] or tensor.dtype != torch.bfloat16 or tensor.stride(-1) != 1:
            wanted_text = f"{list(wanted[name])} bfloat16, its last dimension contiguous"
            raise ValueError(f"{name} is to be {wanted_text}, not {list(tensor.shape)} {tensor.dtype}")
        if tensor.data_ptr() % 16 or any(stride % 8 for stride in tensor.stride()[:-1]):
            raise ValueError(f"{name} is read 16 bytes at once and its rows have to begin at a multiple of that")


def _check_tensors(**wanted: tuple[torch.Tensor, tuple[int, ...], torch.dtype]) -> None:
    for name, (tensor, shape, dtype) in wanted.items():
        if tensor.shape != shape or tensor.dtype != dtype or not tensor.is_contiguous():
            wanted_text = f"{list(shape)} {dtype}, contiguous"
            raise ValueError(f"{name} is to be {wanted_text}, not {list(tensor.shape)} {tensor.dtype}")
        if name not in ("scale", "norm") and tensor.data_ptr() % 16:
            raise ValueError(f"{name} is read 16 bytes at once and has to begin at a multiple of that")


def _activated(x: torch.Tensor, columns: int, heads: int) -> tuple[torch.Tensor, torch.Tensor]:
    """For x [batch, tokens, in features]: rows in float8 whose first `heads` are left free, and their scale; without
    features for GELU nothing."""
    rows = x.shape[:2]
    width = columns - 2 * heads * HEAD_DIM if columns > 3 * heads * HEAD_DIM else 0
    out = x.new_empty((*rows, width), dtype=torch.float8_e4m3fn)
    return out, x.new_empty((*rows, min(width, 1)), dtype=torch.float32)


@torch.library.custom_op("flux_fast::wgmma_gelu_linears", mutates_args=())
def wgmma_gelu_linears(
    x: torch.Tensor,
    scale: torch.Tensor,
    norm: torch.Tensor | None,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor,
    bounds: torch.Tensor,
    other_x: torch.Tensor,
    other_scale: torch.Tensor,
    other_norm: torch.Tensor | None,
    other_weight: torch.Tensor,
    other_weight_scale: torch.Tensor,
    other_bias: torch.Tensor,
    other_bounds: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """GELU(x W^T + b), tanh form, of two streams, as in `Layer`.

    Returns of each [batch, tokens, out features] float8_e4m3fn and its scale [batch, tokens, 1] float32: a bound of the
    row's norm over `quantized_linear.ROW`.

    Raises:
        ValueError: a tensor isn't as `Layer` says, or the kernel has no such sizes (`refusal`).
    """
    first = Layer(x, scale, norm, weight, weight_scale, bias, bounds)
    second = Layer(other_x, other_scale, other_norm, other_weight, other_weight_scale, other_bias, other_bounds)
    _, (one, other) = _launch([first, second], None)
    return *one, *other


@wgmma_gelu_linears.register_fake
def _(*tensors: Any) -> tuple[torch.Tensor, ...]:
    one, other = (_activated(x, len(tensors[3]), 0) for x in (tensors[0], tensors[7]))
    return *one, *other


@torch.library.custom_op("flux_fast::wgmma_qkv_gelu_linear", mutates_args=())
def wgmma_qkv_gelu_linear(
    x: torch.Tensor,
    scale: torch.Tensor,
    norm: torch.Tensor | None,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor,
    bounds: torch.Tensor,
    norm_q: torch.Tensor,
    norm_k: torch.Tensor,
    turns: torch.Tensor,
    eps: float,
    heads: int,
    laid_out: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """x W^T + b, as in `Layer`: query, key and value of `heads` of 128 features each, and GELU of the others.

    norm_q, norm_k [128] bfloat16: the weights of query's and key's RMSNorm; turns [tokens, 128] float16, of each pair
    of columns the angle's cosine and sine; laid_out: as in `Attention`, where `lays_out` the tokens. Returns query and
    key [batch, tokens, 2, heads, 128], normed and turned, and the values [batch, tokens, heads, 128], or laid out,
    float8_e4m3fn; their float32 descales [3, batch, heads], of each the same for all heads: a row's longest over
    `float8_heads.LONGEST`, and a bound of an attention's result over `quantized_linear.ROW`; [batch, tokens, heads *
    128 + others] float8_e4m3fn, whose first columns are left to the attention, and its scale [batch, tokens, 1]
    float32, such that no row is longer than `ROW` with these.

    Raises:
        ValueError: a tensor isn't as said, or the kernel has no such sizes (`refusal`).
    """
    if len(weight) == 3 * heads * HEAD_DIM:
        raise ValueError(f"{len(weight)} out features are those of {heads} heads: none are left for GELU")
    layer = Layer(x, scale, norm, weight, weight_scale, bias, bounds)
    (query_key, value, descales), (rows,) = _launch([layer], Attention([(norm_q, norm_k)], turns, eps, heads, laid_out))
    return query_key, value, descales, *rows


def _qkv(
    streams: Sequence[torch.Tensor], heads: int, laid_out: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query and key, the values and the descales for streams [batch, tokens, in features], to be filled."""
    x, tokens = streams[0], sum(stream.shape[1] for stream in streams)
    batch, float8 = x.shape[0], torch.float8_e4m3fn
    values = (batch, heads, HEAD_DIM, tokens) if laid_out else (batch, tokens, heads, HEAD_DIM)
    return (
        x.new_empty((batch, tokens, 2, heads, HEAD_DIM), dtype=float8),
        x.new_empty(values, dtype=float8),
        x.new_empty((3, batch, heads), dtype=torch.float32),
    )


@wgmma_qkv_gelu_linear.register_fake
def _(*arguments: Any) -> tuple[torch.Tensor, ...]:
    x, weight, (heads, laid_out) = arguments[0], arguments[3], arguments[-2:]
    return *_qkv([x], heads, laid_out), *_activated(x, len(weight), heads)


@torch.library.custom_op("flux_fast::wgmma_qkv_linears", mutates_args=())
def wgmma_qkv_linears(
    x: torch.Tensor,
    scale: torch.Tensor,
    norm: torch.Tensor | None,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor,
    bounds: torch.Tensor,
    other_x: torch.Tensor,
    other_scale: torch.Tensor,
    other_norm: torch.Tensor | None,
    other_weight: torch.Tensor,
    other_weight_scale: torch.Tensor,
    other_bias: torch.Tensor,
    other_bounds: torch.Tensor,
    norm_q: torch.Tensor,
    norm_k: torch.Tensor,
    other_norm_q: torch.Tensor,
    other_norm_k: torch.Tensor,
    turns: torch.Tensor,
    eps: float,
    heads: int,
    laid_out: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x W^T + b of two streams, as in `Layer`: query, key and value of `heads` of 128 features each, the other stream's
    tokens before x's.

    norm_q ... other_norm_k and turns (of all tokens) as in `Attention`. Returns query and key, the values and their
    descales as `wgmma_qkv_gelu_linear` does, of all tokens.

    Raises:
        ValueError: a tensor isn't as said, or the kernel has no such sizes (`refusal`).
    """
    first = Layer(x, scale, norm, weight, weight_scale, bias, bounds)
    second = Layer(other_x, other_scale, other_norm, other_weight, other_weight_scale, other_bias, other_bounds)
    if len(weight) != 3 * heads * HEAD_DIM:
        raise ValueError(f"{len(weight)} out features aren't those of {heads} heads: {3 * heads * HEAD_DIM}")
    norms = [(norm_q, norm_k), (other_norm_q, other_norm_k)]
    (query_key, value, descales), _ = _launch([first, second], Attention(norms, turns, eps, heads, laid_out))
    return query_key, value, descales


@wgmma_qkv_linears.register_fake
def _(*arguments: Any) -> tuple[torch.Tensor, ...]:
    return _qkv([arguments[0], arguments[7]], *arguments[-2:])


def _updated(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """What a stream is after an update, for x [batch, tokens, in features], to be filled."""
    return x.new_empty((*x.shape[:2], len(weight)), dtype=torch.bfloat16)


@torch.library.custom_op("flux_fast::wgmma_gated_linear", mutates_args=())
def wgmma_gated_linear(
    x: torch.Tensor,
    scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor,
    gate: torch.Tensor,
    residual: torch.Tensor,
    text_residual: torch.Tensor | None,
) -> torch.Tensor:
    """residual + gate * (x W^T + b), the tensors as in `Layer` and `Update`, the sum in bfloat16.

    Returns [batch, tokens, out features] bfloat16, contiguous.

    Raises:
        ValueError: a tensor isn't as said, or the kernel has no such sizes (`refusal`).
    """
    layer = Layer(x, scale, None, weight, weight_scale, bias, None)
    (out,) = _launch_updates([layer], [Update(gate, residual, text_residual)])
    return out


@wgmma_gated_linear.register_fake
def _(*arguments: Any) -> torch.Tensor:
    return _updated(arguments[0], arguments[2])


@torch.library.custom_op("flux_fast::wgmma_gated_linears", mutates_args=())
def wgmma_gated_linears(
    x: torch.Tensor,
    scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor,
    gate: torch.Tensor,
    residual: torch.Tensor,
    other_x: torch.Tensor,
    other_scale: torch.Tensor,
    other_weight: torch.Tensor,
    other_weight_scale: torch.Tensor,
    other_bias: torch.Tensor,
    other_gate: torch.Tensor,
    other_residual: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`wgmma_gated_linear` of two streams, whose layers are of one size, in one launch.

    Raises:
        ValueError: a tensor isn't as said, or the kernel has no such sizes (`refusal`).
    """
    first = Layer(x, scale, None, weight, weight_scale, bias, None)
    second = Layer(other_x, other_scale, None, other_weight, other_weight_scale, other_bias, None)
    updates = [Update(gate, residual, None), Update(other_gate, other_residual, None)]
    one, other = _launch_updates([first, second], updates)
    return one, other


@wgmma_gated_linears.register_fake
def _(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return _updated(tensors[0], tensors[2]), _updated(tensors[7], tensors[9])
