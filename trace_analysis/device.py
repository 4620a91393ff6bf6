"""What ran on the GPU, each kernel and copy tied to the host's call that launched it."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

import numpy as np

from trace_analysis.intervals import Union
from trace_analysis.load import CALLS, GPU, NONE, Trace

GRAPH_LAUNCH = re.compile(r"cu(da)?GraphLaunch")
KERNEL_LAUNCH = re.compile(r"cu(da)?Launch(CooperativeKernel|Kernel)")
COPY_CALL = re.compile(r"cu(da)?(Memcpy|Memset)")


@dataclass(frozen=True, eq=False)
class Device:
    """Kernels, copies and memsets of the busiest GPU, in the order of their start.

    event: indices into the trace; launch: the call's, NONE where it isn't in the trace (int64 [n] both). The kernels
    of a CUDA graph have the launch of the graph. `others`: GPUs of the trace that are left out.
    """

    number: object
    event: np.ndarray
    launch: np.ndarray
    busy: Union
    others: tuple[object, ...]


def device(trace: Trace) -> Device | None:
    """None for a trace without a GPU."""
    events = trace.of(GPU)
    if not len(events):
        return None
    numbers = [trace.lanes[lane][0] for lane in trace.lane[events]]
    count = Counter(numbers)
    busiest = min(count, key=lambda number: (-count[number], str(number)))
    events = events[np.array([number == busiest for number in numbers])]
    calls = trace.of(CALLS)
    calls = calls[trace.correlation[calls] != NONE]
    # Of a runtime call and the driver call inside it with the same number, the first in the order of time is the outer.
    known, first = np.unique(trace.correlation[calls], return_index=True)
    launch = np.full(len(events), NONE, np.int64)
    if len(known):
        wanted = trace.correlation[events]
        place = np.minimum(np.searchsorted(known, wanted), len(known) - 1)
        launch = np.where(known[place] == wanted, calls[first][place], NONE)
    others = tuple(sorted((number for number in count if number != busiest), key=str))
    return Device(busiest, events, launch, Union(trace.start[events], trace.end[events]), others)


def calls_named(trace: Trace, pattern: re.Pattern[str]) -> np.ndarray:
    """The host's CUDA calls whose name begins with `pattern`, in the order of time; indices, int64."""
    codes = [code for code, name in enumerate(trace.names) if pattern.match(name)]
    calls = trace.of(CALLS)
    return calls[np.isin(trace.name[calls], codes)]
