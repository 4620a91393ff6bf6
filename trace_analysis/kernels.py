"""Kernels on the GPU, each tied to the moment when the host launched it."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from trace_analysis.load import Event, Trace
from trace_analysis.ranges import Moments

KERNEL = "kernel"
LAUNCHES = frozenset({"cuda_runtime", "cuda_driver"})


@dataclass(frozen=True)
class KernelTime:
    """Device time of all runs of one kernel, in nanoseconds."""

    name: str
    count: int
    device_ns: int


def kernel_times(trace: Trace, when: Moments | None = None) -> tuple[KernelTime, ...]:
    """Every kernel by its device time, the longest first; `when`: only those launched at these moments.

    The moment is the launch's, found by correlation id, not the kernel's own: the GPU runs behind the host. The kernels
    of a CUDA graph carry the id of their `cudaGraphLaunch`.
    """
    launched = launch_moments(trace)
    counts: dict[str, int] = defaultdict(int)
    totals: dict[str, int] = defaultdict(int)
    for event in trace.of({KERNEL}):
        correlation = _correlation(event)
        moment = None if correlation is None else launched.get(correlation)
        if when is None or (moment is not None and when.hold(moment)):
            counts[event.name] += 1
            totals[event.name] += event.duration_ns
    times = (KernelTime(name, counts[name], total) for name, total in totals.items())
    return tuple(sorted(times, key=lambda time: (-time.device_ns, time.name)))


def without_launch(trace: Trace) -> int:
    """How many kernels can't be tied to a launch, as when the trace began after it."""
    launched = launch_moments(trace)
    return sum(_correlation(event) not in launched for event in trace.of({KERNEL}))


def launch_moments(trace: Trace) -> dict[int, int]:
    """Start of the host's call, in nanoseconds, by correlation id."""
    calls = ((_correlation(event), event.start_ns) for event in trace.of(LAUNCHES))
    return {correlation: start for correlation, start in calls if correlation is not None}


def _correlation(event: Event) -> int | None:
    value = event.arguments.get("correlation")
    return value if isinstance(value, int) else None
