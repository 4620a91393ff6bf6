"""What an operator must compute and move at least, from the shapes that `record_shapes=True` leaves in a trace.

FLOPs count a multiplication and an addition as two. Bytes count every input read once and every output written once.
Both are None where the shapes don't tell. The bytes of Inductor's fused kernels are the most that they can be.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from trace_analysis.kinds import FUSED

# "Input type" of Kineto: bytes an element, and the dtype's usual name.
_DTYPES = {
    "float": (4, "fp32"),
    "double": (8, "fp64"),
    "c10::BFloat16": (2, "bf16"),
    "c10::Half": (2, "fp16"),
    "c10::Float8_e4m3fn": (1, "fp8"),
    "c10::Float8_e5m2": (1, "fp8"),
    "signed char": (1, "int8"),
    "unsigned char": (1, "uint8"),
    "bool": (1, "bool"),
    "int": (4, "int32"),
    "long int": (8, "int64"),
    "long": (8, "int64"),
}
Dims = tuple[int, ...]


@dataclass(frozen=True)
class Shapes:
    """Inputs of one operator call: of each a tensor's dimensions, () for what is no tensor, and Kineto's type.

    concrete: arguments that are no tensors, as text; "" for tensors. Lists of tensors are left out of `dims`.
    """

    dims: tuple[Dims, ...]
    types: tuple[str, ...]
    concrete: tuple[str, ...]
    lists: tuple[tuple[Dims, ...], ...] = ()

    @classmethod
    def of(cls, arguments: dict[str, Any]) -> Shapes:
        """From an event's arguments. Raises ValueError or TypeError where they aren't Kineto's."""
        dims: list[Dims] = []
        lists: list[tuple[Dims, ...]] = []
        for entry in arguments["Input Dims"]:
            if isinstance(entry, list) and entry and isinstance(entry[0], list):
                lists.append(tuple(_dims(inner) for inner in entry))
                dims.append(())
            else:
                dims.append(_dims(entry))
        types = tuple(str(kind) for kind in arguments.get("Input type", ()))
        concrete = tuple(str(value) for value in arguments.get("Concrete Inputs", ()))
        return cls(tuple(dims), types, concrete, tuple(lists))

    def bytes_of(self, number: int) -> int | None:
        """Bytes of input `number`; None if it is no tensor of a known dtype."""
        if number >= len(self.types) or self.types[number] not in _DTYPES:
            return None
        return math.prod(self.dims[number]) * _DTYPES[self.types[number]][0]

    def dtype(self, number: int = 0) -> str | None:
        """The usual name of input `number`'s dtype."""
        found = _DTYPES.get(self.types[number]) if number < len(self.types) else None
        return found[1] if found else None


class ShapesCache:
    """Shapes.of, with one object for equal arguments: a trace has few shapes and many calls."""

    def __init__(self) -> None:
        self._known: dict[str, Shapes] = {}

    def __call__(self, arguments: dict[str, Any]) -> Shapes:
        key = f"{arguments['Input Dims']}{arguments.get('Input type')}{arguments.get('Concrete Inputs')}"
        if key not in self._known:
            self._known[key] = Shapes.of(arguments)
        return self._known[key]


def _dims(entry: Any) -> Dims:
    if not all(type(side) is int and side >= 0 for side in entry):
        raise ValueError
    return tuple(entry)


@dataclass(frozen=True)
class Cost:
    """kind: "gemm", "attention", "convolution" or "memory"; dtype: of the operands; shape: to print.

    at_most: `bytes` is not the least that must be moved but the most that can have been.
    """

    kind: str
    dtype: str | None
    shape: str
    flops: int | None
    bytes: int | None
    at_most: bool = False


def has_cost(operator: str) -> bool:
    return operator in _COSTS or FUSED.match(operator) is not None


def cost(operator: str, shapes: Shapes) -> Cost | None:
    """None where the operator isn't known or the shapes are not those it takes."""
    if not has_cost(operator):
        return None
    try:
        return _COSTS.get(operator, _fused)(operator, shapes)
    except (IndexError, ValueError, TypeError):
        return None


def _gemm(first: int) -> Callable[[str, Shapes], Cost | None]:
    """[.., M, K] x [K, N] or batched [B, M, K] x [B, K, N], operands at `first` and after it.

    Other tensors among the inputs are a bias or scales. int8 gives int32, and float8 is taken to give bfloat16.
    """

    def found(operator: str, shapes: Shapes) -> Cost | None:
        *batch, rows, inner = shapes.dims[first]
        *_, other, columns = shapes.dims[first + 1]
        if inner != other:
            return None
        many = math.prod(batch)
        result = {"fp8": 2, "int8": 4}.get(shapes.dtype(first) or "", _size(shapes, first))
        moved = _inputs(shapes) + many * rows * columns * result
        text = f"{rows} x {columns} x {inner}" + (f", {many} times" if many > 1 else "")
        return Cost("gemm", shapes.dtype(first), text, 2 * many * rows * columns * inner, moved)

    return found


def _attention(causal_at: int) -> Callable[[str, Shapes], Cost | None]:
    """softmax(q k^T) v of [batch, heads, tokens, channels]; a causal mask (argument `causal_at`) halves the work."""

    def found(operator: str, shapes: Shapes) -> Cost | None:
        batch, heads, queries, channels = shapes.dims[0]
        _, key_heads, keys, out_channels = shapes.dims[2]
        flops = 2 * batch * heads * queries * keys * (channels + out_channels)
        causal = shapes.concrete[causal_at] == "True"
        if causal:
            flops //= 2
        tensors = math.prod(shapes.dims[0]) + math.prod(shapes.dims[1]) + math.prod(shapes.dims[2])
        moved = _size(shapes, 0) * (tensors + batch * heads * queries * out_channels)
        grouped = "" if key_heads == heads else f" ({key_heads} of keys)"
        text = f"{batch} x {heads} heads{grouped} x {queries} x {keys} tokens x {channels}"
        return Cost("attention", shapes.dtype(0), text + (", causal" if causal else ""), flops, moved)

    return found


def _own_attention(operator: str, shapes: Shapes) -> Cost | None:
    """recipes' operators: query [batch, tokens, heads, head_dim] and key [batch, keys, heads, head_dim], not causal.

    Value and output are counted as large as key and query, which they are but for the dtype of the output.
    """
    batch, queries, heads, channels = shapes.dims[0]
    keys = shapes.dims[1][1]
    flops = 4 * batch * heads * queries * keys * channels
    moved = 2 * _size(shapes, 0) * (math.prod(shapes.dims[0]) + math.prod(shapes.dims[1]))
    text = f"{batch} x {heads} heads x {queries} x {keys} tokens x {channels}"
    return Cost("attention", shapes.dtype(0), text, flops, moved)


def _own_linears(*layers: tuple[int, int], out_bytes: int = 1) -> Callable[[str, Shapes], Cost | None]:
    """recipes' Linears in float8 or int8, in one launch: of each the places of x [batch, tokens, in] and weight [out,
    in]."""

    def found(operator: str, shapes: Shapes) -> Cost | None:
        flops, moved, text = 0, _inputs(shapes), []
        for x, weight in layers:
            batch, tokens, inner = shapes.dims[x]
            columns, other = shapes.dims[weight]
            if inner != other:
                return None
            flops += 2 * batch * tokens * columns * inner
            moved += out_bytes * batch * tokens * columns
            text.append(f"{batch * tokens} x {columns} x {inner}")
        return Cost("gemm", shapes.dtype(0), " + ".join(text), flops, moved)

    return found


def _convolution(operator: str, shapes: Shapes) -> Cost | None:
    """Two dimensions, not transposed: input [N, C, H, W], weight [O, C / groups, R, S]."""
    (batch, _, height, width), (outputs, inputs, rows, columns) = shapes.dims[0], shapes.dims[1]
    stride, padding, dilation = (_numbers(shapes.concrete[i]) for i in (3, 4, 5))
    if shapes.concrete[6] == "True":
        return None
    across = [
        (side + 2 * pad - spread * (reach - 1) - 1) // step + 1
        for side, pad, spread, reach, step in zip(
            (height, width), padding, dilation, (rows, columns), stride, strict=True
        )
    ]
    results = batch * outputs * math.prod(across)
    moved = _inputs(shapes) + _size(shapes, 0) * results
    text = f"{batch} x {inputs} x {height} x {width} by {outputs} x {rows} x {columns}"
    return Cost("convolution", shapes.dtype(0), text, 2 * results * inputs * rows * columns, moved)


def _pointwise(operator: str, shapes: Shapes) -> Cost | None:
    """Reads its tensors, writes one as large as they are together broadcast, in the first one's dtype."""
    tensors = [i for i, dims in enumerate(shapes.dims) if dims and shapes.bytes_of(i) is not None]
    if not tensors:
        return None
    result: list[int] = []
    for i in tensors:
        dims = shapes.dims[i]
        result = [1] * (len(dims) - len(result)) + result
        padded = (1,) * (len(result) - len(dims)) + dims
        result = [max(a, b) for a, b in zip(result, padded, strict=True)]
    moved = sum(shapes.bytes_of(i) or 0 for i in tensors) + math.prod(result) * _size(shapes, tensors[0])
    return Cost("memory", shapes.dtype(tensors[0]), " x ".join(map(str, result)), None, moved)


def _copy(operator: str, shapes: Shapes) -> Cost | None:
    """copy_(target, source)."""
    written, read = shapes.bytes_of(0), shapes.bytes_of(1)
    if written is None or read is None:
        return None
    return Cost("memory", shapes.dtype(0), " x ".join(map(str, shapes.dims[0])), None, written + read)


def _norm(operator: str, shapes: Shapes) -> Cost | None:
    size = shapes.bytes_of(0)
    if size is None:
        return None
    weights = sum(shapes.bytes_of(i) or 0 for i in range(1, len(shapes.dims)) if shapes.dims[i])
    return Cost("memory", shapes.dtype(0), " x ".join(map(str, shapes.dims[0])), None, 2 * size + weights)


def _fused(operator: str, shapes: Shapes) -> Cost | None:
    """A kernel of Inductor's: its arguments are the buffers it reads and writes, those changed in place once.

    A buffer is passed whole even where the kernel uses only a part of it.
    """
    sizes = [shapes.bytes_of(i) for i in range(len(shapes.dims)) if shapes.dims[i]]
    if not sizes or None in sizes:
        return None
    largest = max(shapes.dims, key=math.prod)
    return Cost("memory", shapes.dtype(0), " x ".join(map(str, largest)), None, sum(size or 0 for size in sizes), True)


def _inputs(shapes: Shapes) -> int:
    """Bytes of all inputs that are tensors."""
    return sum(shapes.bytes_of(i) or 0 for i in range(len(shapes.dims)))


def _size(shapes: Shapes, number: int) -> int:
    return _DTYPES[shapes.types[number]][0] if shapes.types[number] in _DTYPES else _unknown()


def _unknown() -> int:
    raise ValueError


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.strip("[]").split(","))


_COSTS: dict[str, Callable[[str, Shapes], Cost | None]] = {
    "aten::mm": _gemm(0),
    "aten::bmm": _gemm(0),
    "aten::addmm": _gemm(1),
    "aten::baddbmm": _gemm(1),
    "aten::_addmm_activation": _gemm(1),
    "aten::_scaled_mm": _gemm(0),
    "aten::_int_mm": _gemm(0),
    "aten::_scaled_dot_product_flash_attention": _attention(4),
    "aten::_scaled_dot_product_efficient_attention": _attention(6),
    "aten::_scaled_dot_product_cudnn_attention": _attention(6),
    "flux_fast::wgmma_gated_linear": _own_linears((0, 2), out_bytes=2),
    "flux_fast::wgmma_gated_linears": _own_linears((0, 2), (7, 9), out_bytes=2),
    "flux_fast::wgmma_qkv_linears": _own_linears((0, 3), (7, 10)),
    "flux_fast::wgmma_gelu_linears": _own_linears((0, 3), (7, 10)),
    "flux_fast::wgmma_qkv_gelu_linear": _own_linears((0, 3)),
    "flux_fast::cudnn_attention": _own_attention,
    "flux_fast::cudnn_attention_float8": _own_attention,
    "flux_fast::wgmma_attention": _own_attention,
    "flux_fast::wgmma_attention_beside": _own_attention,
    "flux_fast::attention_float8": _own_attention,
    "flux_fast::flash_attention_3": _own_attention,
    "flux_fast::flash_attention_3_float8": _own_attention,
    "aten::_convolution": _convolution,
    "aten::copy_": _copy,
    "aten::native_layer_norm": _norm,
    "aten::_fused_rms_norm": _norm,
    **dict.fromkeys(
        [
            *("aten::add", "aten::add_", "aten::sub", "aten::sub_", "aten::mul", "aten::mul_", "aten::div"),
            *("aten::div_", "aten::pow", "aten::neg", "aten::rsqrt", "aten::sin", "aten::cos", "aten::exp"),
            *("aten::gelu", "aten::gelu_", "aten::silu", "aten::silu_", "aten::clamp", "aten::abs"),
        ],
        _pointwise,
    ),
}
