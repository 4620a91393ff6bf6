"""Milliseconds of single GPU kernels, launch overhead left out: many calls in one CUDA graph, timed by CUDA events."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from utils.timing import summary


def graph_ms(calls: Sequence[Callable[[], object]], repeats: int = 20) -> dict[str, float]:
    """Median, p10 and p90 of milliseconds a call: `calls` one after the other are a graph, replayed `repeats` times.

    Give calls on inputs of their own that together exceed the second-level cache, where its help isn't meant.
    """
    graph, stream = captured(calls)
    with torch.cuda.stream(stream):
        graph.replay()
        torch.cuda.synchronize()
        times = []
        for _ in range(repeats):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / len(calls))
    return summary(times)


def captured(
    calls: Sequence[Callable[[], object]], keep_graph: bool = False
) -> tuple[torch.cuda.CUDAGraph, torch.cuda.Stream]:
    """`calls` one after the other as a graph, and the stream that it was captured on.

    keep_graph: it isn't instantiated yet, and can be changed.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls[:2]:  # compiles and autotunes, outside the capture
            call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph(keep_graph=keep_graph)
        with torch.cuda.graph(graph, stream=stream):
            for call in calls:
                call()
    return graph, stream
