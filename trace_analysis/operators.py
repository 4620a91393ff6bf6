"""Operators on the host by their own time: without that of what they call."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from trace_analysis.host import Host
from trace_analysis.intervals import Union
from trace_analysis.load import Trace


@dataclass(frozen=True)
class OperatorTime:
    """Own host time of all calls of one operator, in nanoseconds."""

    name: str
    count: int
    own_ns: int


def operator_times(trace: Trace, host: Host, ranges: Union | None = None) -> tuple[OperatorTime, ...]:
    """Every operator by its own time, the longest first; `ranges`: only calls that begin in these."""
    events = trace.of({"cpu_op"})
    if ranges is not None:
        events = events[ranges.holds(trace.start[events])]
    names, codes = np.unique(trace.name[events], return_inverse=True)
    own = np.zeros(len(names), np.int64)
    np.add.at(own, codes, host.own[events])
    counts = np.bincount(codes, minlength=len(names))
    rows = zip(names.tolist(), counts.tolist(), own.tolist(), strict=True)
    times = [OperatorTime(trace.names[name], count, time) for name, count, time in rows]
    return tuple(sorted(times, key=lambda time: (-time.own_ns, time.name)))
