"""The pipeline's stages on the host: the ranges that `utils.ranges.annotate` puts into a trace."""

from __future__ import annotations

import bisect
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median

from trace_analysis.load import Event, Trace

DENOISING_STEP = "denoising_step"
NAMES = ("prompt_encoding", DENOISING_STEP, "decoding", "postprocessing")


@dataclass(frozen=True)
class RangeTime:
    """Host time of all ranges of one name, in nanoseconds."""

    name: str
    count: int
    total_ns: int
    median_ns: int


class Moments:
    """The time that some events cover together; their ends don't belong to it."""

    def __init__(self, events: Iterable[Event]):
        self._starts: list[int] = []
        self._ends: list[int] = []
        for start, end in sorted((event.start_ns, event.end_ns) for event in events):
            if self._ends and start <= self._ends[-1]:
                self._ends[-1] = max(end, self._ends[-1])
            else:
                self._starts.append(start)
                self._ends.append(end)

    def hold(self, moment_ns: int) -> bool:
        index = bisect.bisect_right(self._starts, moment_ns) - 1
        return index >= 0 and moment_ns < self._ends[index]


def named(trace: Trace, name: str) -> list[Event]:
    """A range's events on the host, in the order of time; those that Kineto repeats on the GPU are left out."""
    events = (event for event in trace.of({"user_annotation"}) if event.name == name)
    return sorted(events, key=lambda event: event.start_ns)


def range_times(trace: Trace) -> tuple[RangeTime, ...]:
    """The ranges of NAMES that the trace holds, in that order."""
    times = []
    for name in NAMES:
        durations = [event.duration_ns for event in named(trace, name)]
        if durations:
            times.append(RangeTime(name, len(durations), sum(durations), int(median(durations))))
    return tuple(times)
