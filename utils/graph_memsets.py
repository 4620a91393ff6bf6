"""A CUDA graph's memsets as kernels.

cuBLAS and cuDNN put memsets of four bytes between their kernels. A straight line of kernels alone is launched in time
that hardly grows with their number (CUDA 12.6 and later); one memset in it, and the host handles each node by itself.
`python -m benchmark.graph_launch` measures both.

Sources: NVIDIA's "Constant Time Launch for Straight-Line CUDA Graphs" (2024); the CUDA driver API's graph management.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from utils import cuda_bindings


class _Memory:
    """What a memset writes to, as PyTorch takes foreign memory: one row of elements of 1, 2 or 4 bytes."""

    def __init__(self, address: int, elements: int, size: int):
        self.__cuda_array_interface__ = {
            "data": (address, False), "shape": (elements,), "typestr": f"<{'u' if size == 1 else 'i'}{size}",
            "version": 3,
        }  # fmt: skip


def replace_memsets(graph: torch.cuda.CUDAGraph, side: torch.cuda.Stream) -> int:
    """Put a kernel that writes the same in the place of each memset of one row; gives how many those were.

    The graph was captured with keep_graph=True on the stream `side`, and isn't instantiated yet. Without the package
    `cuda-bindings`, which comes with PyTorch's CUDA builds, none is replaced.

    Raises:
        UserError: a call of the driver failed; it says which one.
    """
    if not cuda_bindings.installed():
        return 0
    from cuda.bindings import driver

    call = partial(cuda_bindings.call, driver, what="cuda_graph")

    def listed(name: str, of: Any) -> list[Any]:
        return call(name, of, call(name, of)[-1])[0]

    raw = driver.CUgraph(graph.raw_cuda_graph())
    memsets = {}
    for node in listed("cuGraphGetNodes", raw):
        if call("cuGraphNodeGetType", node)[0] == driver.CUgraphNodeType.CU_GRAPH_NODE_TYPE_MEMSET:
            (memset,) = call("cuGraphMemsetNodeGetParams", node)
            if memset.height == 1:
                memsets[node] = memset
    if not memsets:
        return 0
    fills = torch.cuda.CUDAGraph(keep_graph=True)  # a graph of these kernels alone, for their parameters
    with torch.cuda.graph(fills, stream=side, capture_error_mode="thread_local"):
        for memset in memsets.values():
            memory = _Memory(int(memset.dst), memset.width, memset.elementSize)
            torch.as_tensor(memory, device=side.device).fill_(_signed(memset.value, memset.elementSize))
    (kernel,) = listed("cuGraphGetRootNodes", driver.CUgraph(fills.raw_cuda_graph()))
    for node in memsets:
        before, after = (listed(f"cuGraphNodeGet{which}", node) for which in ("Dependencies", "DependentNodes"))
        (new,) = call("cuGraphAddKernelNode", raw, before, len(before), *call("cuGraphKernelNodeGetParams", kernel))
        call("cuGraphAddDependencies", raw, [new] * len(after), after, None, len(after))
        call("cuGraphDestroyNode", node)
        kernel = next(iter(listed("cuGraphNodeGetDependentNodes", kernel)), None)  # they stand in a line
    return len(memsets)


def _signed(value: int, size: int) -> int:
    """The lowest `size` bytes of `value` as the number that a tensor of such elements holds."""
    bits = 8 * size
    value &= (1 << bits) - 1
    return value if size == 1 or value < 1 << (bits - 1) else value - (1 << bits)
