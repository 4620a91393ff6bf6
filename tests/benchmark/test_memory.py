"""Peak memory: of what happens after the reset, and under CUDA graphs."""

from __future__ import annotations

import mmap

import pytest
import torch

from benchmark.memory import peak_bytes, reset_peak
from utils.cuda_graph import Graphed, Graphs

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SIZE = 2**28  # bytes


def test_cpu_peak_is_that_since_the_reset() -> None:
    reset_peak(CPU)
    before = peak_bytes(CPU)
    with mmap.mmap(-1, SIZE) as large:  # from the kernel, and not what an allocator kept of other tests
        for page in range(0, SIZE, mmap.PAGESIZE):
            large[page] = 1
        assert peak_bytes(CPU) - before > 0.9 * SIZE
    reset_peak(CPU)
    assert peak_bytes(CPU) - before < 0.5 * SIZE


@pytest.mark.gpu
def test_gpu_peak_holds_a_graphs_intermediates() -> None:
    graphed = Graphed(lambda x: (x.expand(SIZE // 4, 1) + 1).sum(), Graphs(1))
    x = torch.ones(1, device=CUDA)
    reset_peak(CUDA)
    held, allocated = peak_bytes(CUDA), torch.cuda.memory_allocated()  # by other tests
    graphed(x)
    reset_peak(CUDA)
    graphed(x)
    assert peak_bytes(CUDA) - held >= SIZE
    assert torch.cuda.max_memory_allocated() - allocated < SIZE, "which is why it isn't what is allocated that counts"
    del graphed
    reset_peak(CUDA)
    assert peak_bytes(CUDA) - held < SIZE, "what is merely kept from before doesn't count"
