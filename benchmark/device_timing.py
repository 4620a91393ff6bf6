"""Milliseconds of single GPU kernels, launch overhead left out: many calls in one CUDA graph, timed by CUDA events."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch

from utils.timing import summary

Captured = tuple[torch.cuda.CUDAGraph, torch.cuda.Stream]
Name = TypeVar("Name")


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


def captured(calls: Sequence[Callable[[], object]], keep_graph: bool = False) -> Captured:
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


def sustained_ms(
    graphs: Mapping[Name, Captured], calls: int, seconds: float = 0.25, turns: int = 4
) -> dict[Name, dict[str, float]]:
    """Of each graph of `calls` calls, milliseconds a call of series of `seconds`, each after as long a series untimed.

    The graphs take turns, every other time backwards: a GPU at its power limit needs some tenths of a second to come to
    the clock that it keeps, and grows warmer meanwhile.
    """
    found: dict[Name, list[float]] = {name: [] for name in graphs}
    for turn in range(turns):
        for name in found if turn % 2 == 0 else reversed(found):
            _series(graphs[name], seconds)
            elapsed, replays = _series(graphs[name], seconds)
            found[name].append(1000 * elapsed / replays / calls)
    return {name: summary(ms) for name, ms in found.items()}


def _series(captured: Captured, seconds: float) -> tuple[float, int]:
    """Replays without a pause for about so long; the seconds that they took, and their number."""
    graph, stream = captured
    with torch.cuda.stream(stream):
        begun = time.perf_counter()
        graph.replay()
        torch.cuda.synchronize()
        number = max(1, round(seconds / (time.perf_counter() - begun)))
        begun = time.perf_counter()
        for _ in range(number):
            graph.replay()
        torch.cuda.synchronize()
        return time.perf_counter() - begun, number
