"""Milliseconds of single GPU kernels, launch overhead left out: many calls in one CUDA graph, timed by CUDA events."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, TypeVar

import torch

from utils.environment import device_state
from utils.timing import summary

Name = TypeVar("Name")


@dataclass(frozen=True)
class Captured:
    """Calls as a CUDA graph. While this is there, what they read isn't freed: replaying reads it where it lay."""

    graph: torch.cuda.CUDAGraph
    stream: torch.cuda.Stream
    calls: tuple[Callable[[], object], ...]

    def replay(self) -> None:
        with torch.cuda.stream(self.stream):
            self.graph.replay()


def graph_ms(calls: Sequence[Callable[[], object]], repeats: int = 20) -> dict[str, float]:
    """Median, p10 and p90 of milliseconds a call: `calls` one after the other are a graph, replayed `repeats` times.

    Give calls on inputs of their own that together exceed the second-level cache, where its help isn't meant.
    """
    graph = captured(calls)
    with torch.cuda.stream(graph.stream):
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
    """`calls` one after the other as a graph.

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
    return Captured(graph, stream, tuple(calls))


def sustained(
    graphs: Mapping[Name, Captured], calls: int, device: torch.device, seconds: float = 0.25, turns: int = 4
) -> dict[Name, dict[str, Any]]:
    """Of each graph of `calls` calls: `ms` a call, of series of `seconds`, each after as long a series untimed; and the
    `sm_clock_mhz` meanwhile, None where nvidia-smi doesn't say.

    The graphs take turns, every other time backwards: a GPU at its power limit needs some tenths of a second to come to
    the clock that it keeps, and grows warmer meanwhile.
    """
    found: dict[Name, list[float]] = {name: [] for name in graphs}
    clocks: dict[Name, list[float]] = {name: [] for name in graphs}
    for turn in range(turns):
        for name in found if turn % 2 == 0 else reversed(found):
            _series(graphs[name], seconds, device)
            ms, clock = _series(graphs[name], seconds, device)
            found[name].append(ms / calls)
            clocks[name] += [] if clock is None else [clock]
    return {
        name: {"ms": summary(ms), "sm_clock_mhz": median(clocks[name]) if clocks[name] else None}
        for name, ms in found.items()
    }


def _series(graph: Captured, seconds: float, device: torch.device) -> tuple[float, float | None]:
    """Replays without a pause for about so long: milliseconds of one, and the GPU's clock while they run."""
    with torch.cuda.stream(graph.stream):
        begun = time.perf_counter()
        graph.replay()
        torch.cuda.synchronize()
        number = max(1, round(seconds / (time.perf_counter() - begun)))
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(number):
            graph.replay()
        end.record()
        clock = device_state(device)["sm_clock_mhz"]
        end.synchronize()
        return start.elapsed_time(end) / number, clock
