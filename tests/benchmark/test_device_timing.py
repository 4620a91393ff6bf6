"""Calls as CUDA graphs: what they read stays theirs, and times and clocks are those of each."""

from __future__ import annotations

import gc
from functools import partial

import pytest
import torch

from benchmark.device_timing import captured, sustained

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")


def test_memory_that_a_graph_reads_is_not_freed() -> None:
    ones = torch.ones(1 << 20, device=CUDA)
    total = torch.zeros((), device=CUDA)
    graph = captured([partial(torch.sum, ones, dim=0, out=total)])
    del ones
    gc.collect()
    torch.full((1 << 20,), 2.0, device=CUDA)  # would lie where the ones lay
    total.zero_()
    torch.cuda.synchronize()
    graph.replay()
    torch.cuda.synchronize()
    assert total.item() == 1 << 20


def test_longer_calls_take_longer() -> None:
    small, large = (torch.randn(n, n, device=CUDA, dtype=torch.bfloat16) for n in (512, 4096))
    graphs = {name: captured([partial(torch.mm, x, x)] * 5) for name, x in (("small", small), ("large", large))}
    found = sustained(graphs, 5, CUDA, seconds=0.02, turns=2)
    assert found["large"]["ms"]["median"] > 10 * found["small"]["ms"]["median"]
    assert all(100 < figures["sm_clock_mhz"] < 3000 for figures in found.values())
