"""Memsets of a CUDA graph as kernels: the same bytes in the same order, without a memset left."""

from __future__ import annotations

import pytest
import torch

from utils.graph_memsets import _signed, replace_memsets


@pytest.mark.parametrize(
    ("value", "size", "expected"),
    [
        (0xFF, 1, 255),
        (0x1FF, 1, 255),
        (0x7FFF, 2, 0x7FFF),
        (0x8000, 2, -0x8000),
        (0xFFFFFFFF, 4, -1),
        (7, 4, 7),
    ],
)
def test_values_as_tensors_hold_them(value: int, size: int, expected: int) -> None:
    assert _signed(value, size) == expected


@pytest.mark.gpu
def test_the_same_is_written_in_the_same_order() -> None:
    pytest.importorskip("cuda.bindings")
    from cuda.bindings import driver

    memory = torch.zeros(64, dtype=torch.int32, device="cuda")
    copies = torch.zeros(3, 64, dtype=torch.int32, device="cuda")
    side = torch.cuda.Stream()

    def work() -> None:
        stream = torch.cuda.current_stream().cuda_stream
        memory.add_(1)
        (status,) = driver.cuMemsetD32Async(memory.data_ptr(), 0xFFFFFFFE, 8, stream)
        assert status == driver.CUresult.CUDA_SUCCESS
        copies[0].copy_(memory)
        driver.cuMemsetD8Async(memory.data_ptr() + 4, 0x81, 3, stream)
        driver.cuMemsetD16Async(memory.data_ptr() + 64, 0x9ABC, 5, stream)
        copies[1].copy_(memory)
        driver.cuMemsetD2D32Async(memory.data_ptr(), 64, 5, 2, 4, stream)  # of four rows: left as it is
        copies[2].copy_(memory)

    with torch.cuda.stream(side):
        work()
    side.synchronize()
    expected = copies.clone()
    for replaced in (False, True):
        memory.zero_()
        copies.zero_()
        graph = torch.cuda.CUDAGraph(keep_graph=True)
        with torch.cuda.graph(graph, stream=side):
            work()
        if replaced:
            assert replace_memsets(graph, side) == 3
            assert replace_memsets(graph, side) == 0, "none is left but that of several rows"
        graph.instantiate()
        for _ in range(2):
            memory.zero_()
            graph.replay()
            torch.cuda.synchronize()
            assert torch.equal(copies, expected), replaced


@pytest.mark.gpu
def test_a_graph_without_memsets_stays_as_it_is() -> None:
    x, side = torch.zeros(4, device="cuda"), torch.cuda.Stream()
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    with torch.cuda.graph(graph, stream=side):
        x.add_(1)
    assert replace_memsets(graph, side) == 0
    graph.instantiate()
    graph.replay()
    torch.cuda.synchronize()
    assert x.tolist() == [1.0] * 4
