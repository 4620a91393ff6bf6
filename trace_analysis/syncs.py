"""Where the host waits for the GPU inside the denoising steps, which operator and line made it, and what it costs."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from trace_analysis.device import COPY_CALL, Device, calls_named
from trace_analysis.host import Host, source
from trace_analysis.load import NONE, Trace

SYNC_CALL = re.compile(r"cu(da)?(Stream|Device|Event|Ctx|Thread)Synchronize")


@dataclass(frozen=True)
class Sync:
    """One wait. Times in nanoseconds, starts from the trace's first event.

    call: "cudaStreamSynchronize", ... or a blocking copy, which the synchronisation after it in the same operator is
        part of.
    step: index of the denoising step.
    operators: those around the call, the outermost first.
    outside_torch, own: source lines, where stacks were recorded: innermost frame outside PyTorch, innermost in the
        user's own code.
    idle_after_ns: how long the GPU had nothing to do from the return on (or since it ran dry in the wait).
    """

    call: str
    step: int
    start_ns: int
    time_ns: int
    operators: tuple[str, ...]
    outside_torch: str | None
    own: str | None
    idle_after_ns: int


def sync_calls(trace: Trace, device: Device) -> np.ndarray:
    """All waits of a trace, in the order of time; indices, int64.

    Of copies those that aren't asynchronous, and those from or to pageable memory that returned only when done.
    """
    blocking = []
    copies = set(calls_named(trace, COPY_CALL).tolist())
    for event, call in zip(device.event.tolist(), device.launch.tolist(), strict=True):
        if call in copies and trace.name_of(call).startswith(("cudaMemcpy", "cuMemcpy")):
            waited = "Pageable" in trace.name_of(event) and trace.end[call] >= trace.end[event]
            if waited or "Async" not in trace.name_of(call):
                blocking.append(call)
    return np.unique(np.concatenate((calls_named(trace, SYNC_CALL), np.array(blocking, np.int64))))


def syncs(trace: Trace, host: Host, device: Device, steps: np.ndarray) -> tuple[Sync, ...]:
    """The waits inside the steps (`steps`: their events), in the order of time."""
    found = []
    zero = int(trace.start[0])
    for call, last in _waits(trace, host, sync_calls(trace, device)):
        start, end = int(trace.start[call]), int(trace.end[last])
        step = np.flatnonzero((trace.start[steps] <= start) & (start < trace.end[steps]))
        if not len(step):
            continue
        origin = source(host.frames(call))
        found.append(
            Sync(
                call=trace.name_of(call),
                step=int(step[0]),
                start_ns=start - zero,
                time_ns=end - start,
                operators=host.operators(call),
                outside_torch=origin.outside_torch,
                own=origin.own,
                idle_after_ns=_idle_after(device, start, end),
            )
        )
    return tuple(found)


def _waits(trace: Trace, host: Host, calls: np.ndarray) -> list[tuple[int, int]]:
    """First and last call of each wait: a copy from or to pageable memory is followed by a synchronisation."""
    found: list[tuple[int, int]] = []
    copies: dict[int, int] = {}  # by the operator around them: their place in `found`
    for call in calls.tolist():
        operator = int(host.parent[call])
        within = operator != NONE and trace.categories[trace.category[operator]] == "cpu_op"
        if not SYNC_CALL.match(trace.name_of(call)):
            if within:
                copies[operator] = len(found)
        elif operator in copies:
            place = copies.pop(operator)
            found[place] = found[place][0], call
            continue
        found.append((call, call))
    return found


def _idle_after(device: Device, start: int, end: int) -> int:
    """From where the GPU ran dry (in the wait, at the earliest) to its next work; 0 if it was busy at the return."""
    busy = device.busy
    following = int(np.searchsorted(busy.start, end, side="left"))
    if following == len(busy.start):
        return 0  # nothing follows: the trace ends
    dry = int(busy.end[following - 1]) if following else end
    return int(busy.start[following]) - max(dry, start) if dry <= end else 0
