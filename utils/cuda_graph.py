"""A function's calls as CUDA graphs: the host launches all of a call's kernels at once, and their gaps close.

One graph for each kind of call, captured at the first one: fixed addresses in, fixed kernels, fixed addresses out. So
a call's tensors are copied to where the graph reads, and what it gives is copied from where the next replay writes.
All graphs share one memory pool: none runs beside another, so that one's intermediates may lie where another's lay.

Source: https://pytorch.org/docs/stable/notes/cuda.html#cuda-graphs.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch.utils import _pytree as pytree

from utils.errors import UserError, one_line, ran_out_of_memory, refused
from utils.graph_memsets import replace_memsets

LIMIT = 10  # graphs of one pipeline: transformer and decoder at four sizes, and two text encoders
HOISTED_LIMIT = 6  # and of what is hoisted: for four sizes and two numbers of steps, or the like
_WARM_UP_CALLS = 2  # the first compiles and autotunes, which a capture can't hold; the second finds it done

Value = TypeVar("Value")


class _Tensor:
    """Marks a tensor's place among the other arguments."""


_TENSOR = _Tensor()


@dataclass(frozen=True)
class Arguments:
    """A call's arguments taken apart, nested ones too: its tensors, everything else, and how they stood together."""

    tensors: tuple[torch.Tensor, ...]
    others: tuple[Any, ...]
    structure: pytree.TreeSpec

    @classmethod
    def of(cls, args: tuple, kwargs: dict[str, Any]) -> Arguments:
        leaves, structure = pytree.tree_flatten((args, kwargs))
        tensors = tuple(leaf for leaf in leaves if isinstance(leaf, torch.Tensor))
        others = tuple(_TENSOR if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves)
        return cls(tensors, others, structure)

    @property
    def key(self) -> Hashable:
        """What a graph is specialised to: each tensor's shape, strides, dtype and device, and every other argument.

        Raises:
            UserError: an argument is neither a tensor nor hashable.
        """
        tensors = tuple((t.shape, t.stride(), t.dtype, t.device) for t in self.tensors)
        others = tuple((type(x), x.hex() if isinstance(x, float) else x) for x in self.others)  # 1, 1.0 and True differ
        try:
            hash(others)
        except TypeError as error:
            raise UserError(f"cuda_graph: graphs can't be told apart by an argument of this call ({error})") from None
        return str(self.structure), tensors, others

    def put_together(self, tensors: Sequence[torch.Tensor]) -> tuple[tuple, dict[str, Any]]:
        """The call's args and kwargs, with `tensors` in place of its own."""
        new = iter(tensors)
        leaves = [next(new) if other is _TENSOR else other for other in self.others]
        return pytree.tree_unflatten(leaves, self.structure)


class LeastRecentlyUsed(Generic[Value]):
    """At most `limit` values by key; the one asked for longest ago makes way, after the new one has been made."""

    def __init__(self, limit: int):
        if limit < 1:
            raise ValueError(f"limit is at least 1, not {limit}")
        self.limit = limit
        self.values: OrderedDict[Hashable, Value] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], Value]) -> Value:
        """The value of `key`, made if it isn't there; nothing is kept of a `make` that raises."""
        if key not in self.values:
            self.values[key] = make()
            if len(self.values) > self.limit:
                self.values.popitem(last=False)
        self.values.move_to_end(key)
        return self.values[key]


class Graphs(LeastRecentlyUsed["Captured"]):
    """Graphs of one pipeline, in one memory pool; also in that of `others`, which have a limit of their own."""

    def __init__(self, limit: int, others: Graphs | None = None):
        super().__init__(limit)
        self.family: list[Graphs] = others.family if others is not None else []
        self.family.append(self)

    def clear(self) -> None:
        """Forget all graphs in the pool."""
        for graphs in self.family:
            graphs.values.clear()

    def capture(self, function: Callable, arguments: Arguments, warm_up: Callable) -> Captured:
        device = _device(arguments.tensors)
        # A pool ends with its last graph: it is that of the graphs that are there, and the first one begins another.
        # The stream stays the same, for cuBLAS keeps a workspace for each that it has seen.
        one = next((captured for graphs in self.family for captured in graphs.values.values()), None)
        if one is None:
            return Captured(function, arguments, warm_up, None, torch.cuda.Stream(device))
        return Captured(function, arguments, warm_up, one.graph.pool(), one.side)


class Captured:
    """One graph: `function` called with arguments like `arguments`, captured on the stream `side` after `warm_up` was
    called there with the same.

    Raises:
        UserError: `function` does what a graph can't hold, such as waiting for the device or compiling.
    """

    def __init__(self, function: Callable, arguments: Arguments, warm_up: Callable, pool: Any, side: torch.cuda.Stream):
        self.side = side
        self.inputs = [_like(tensor) for tensor in arguments.tensors]
        torch._foreach_copy_(self.inputs, arguments.tensors)
        args, kwargs = arguments.put_together(self.inputs)
        current = torch.cuda.current_stream(side.device)
        side.wait_stream(current)
        with torch.cuda.stream(side):
            for _ in range(_WARM_UP_CALLS):
                warm_up(*args, **kwargs)
        current.wait_stream(side)
        self.graph = torch.cuda.CUDAGraph(keep_graph=True)
        before = refused()
        try:
            # thread_local: another thread's work, such as a compiler's, is none of this capture's business.
            with torch.cuda.graph(self.graph, pool=pool, stream=side, capture_error_mode="thread_local"):
                self.outputs, self.structure = pytree.tree_flatten(function(*args, **kwargs))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # that the capture failed; what went wrong within is its context
            torch.cuda.set_stream(current)  # where the capture's end fails, it leaves the other one
            cause = error.__context__ or error
            if ran_out_of_memory(cause, before):
                raise cause from None
            raise UserError(
                f"cuda_graph: a call can't be captured ({one_line(cause)}): use cuda_graph=false"
            ) from error
        replace_memsets(self.graph, side)
        self.graph.instantiate()

    def replay(self, tensors: tuple[torch.Tensor, ...]) -> Any:
        """The function's result for `tensors`, in memory of its own. Waits for nothing."""
        torch._foreach_copy_(self.inputs, tensors)
        self.graph.replay()
        outputs = [x.clone() if isinstance(x, torch.Tensor) else x for x in self.outputs]
        return pytree.tree_unflatten(outputs, self.structure)


class Graphed:
    """Stands in for `function`, which computes on one CUDA device, without autograd, and changes none of its inputs.

    What it reads besides its arguments, such as weights, must stay where it is: new values are written in place.
    warm_up: called with its arguments before it is captured; does all that `function` does only once, such as
    compiling. By default `function`.

    Raises:
        UserError: at a call whose tensors aren't on one CUDA device, or whose other arguments aren't hashable.
    """

    def __init__(self, function: Callable, graphs: Graphs, warm_up: Callable | None = None):
        self.function, self.graphs, self.warm_up = function, graphs, warm_up or function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        arguments = Arguments.of(args, kwargs)
        # Buffers made in inference mode couldn't be written to outside it.
        with torch.inference_mode(False), torch.no_grad():
            key = (self.function, arguments.key)
            captured = self.graphs.get(key, lambda: self.graphs.capture(self.function, arguments, self.warm_up))
            return captured.replay(arguments.tensors)


def _device(tensors: Sequence[torch.Tensor]) -> torch.device:
    devices = {tensor.device for tensor in tensors}
    if len(devices) != 1 or next(iter(devices)).type != "cuda":
        found = ", ".join(sorted(map(str, devices))) or "no tensor"
        raise UserError(f"cuda_graph: all tensors of a call must be on one CUDA device, found {found}")
    return devices.pop()


def _like(tensor: torch.Tensor) -> torch.Tensor:
    """An empty tensor of the same shape, dtype and strides; contiguous for one expanded from fewer elements."""
    expanded = any(stride == 0 and size > 1 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    if expanded:
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
