"""Denoising steps and the other stages: their time on the host, and the GPU's time for what they launched.

The ranges are those that `utils.ranges.annotate` puts into a trace; another marker can stand for the steps.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from trace_analysis.device import COPY_CALL, GRAPH_LAUNCH, KERNEL_LAUNCH, Device, calls_named
from trace_analysis.host import Host
from trace_analysis.intervals import Total
from trace_analysis.kernels import KernelKinds
from trace_analysis.load import NONE, Trace

DENOISING_STEP, DENOISING_LOOP = "denoising_step", "denoising_loop"  # each step; or all of a call, launched at once
STAGES = ("prompt_encoding", "decoding", "postprocessing")


@dataclass(frozen=True)
class DeviceTime:
    """The GPU in a span's window, in nanoseconds: busy + idle = window, and window = sum of kinds + foreign + idle -
    overlap, both exactly.

    window_start_ns: where what was launched before had ended, for a step after the first; for other spans not before
        the host's start.
    kinds: time of the kernels and copies that the span launched, by kind.
    foreign_ns: time in the window of what the span did not launch.
    overlap_ns: time that kernels ran beside others, or ran outside the window.
    kernels: kernels run; the launches and copies are calls of the host (a graph launch runs many kernels).
    """

    window_start_ns: int
    window_ns: int
    busy_ns: int
    idle_ns: int
    overlap_ns: int
    foreign_ns: int
    kinds: dict[str, int]
    kernels: int
    kernel_launches: int
    graph_launches: int
    copies: int


@dataclass(frozen=True)
class Span:
    """One step, one stage, or everything. Times in nanoseconds; starts from the trace's first event.

    operators_ns: own time of the operators that began in the span, on all threads.
    device: None in a trace without a GPU, or where the span launched nothing, or where it can't be trusted.
    """

    name: str
    index: int
    host_start_ns: int
    host_ns: int
    operators_ns: int
    device: DeviceTime | None


@dataclass(frozen=True)
class Spans:
    """steps: in the order of time; stages: prompt encoding, decoding, ...; whole: from the first range to the end of
    the last one and of all that was launched in between, or without ranges the whole trace (`everything`)."""

    steps: tuple[Span, ...]
    stages: tuple[Span, ...]
    whole: Span
    everything: bool


def host_ranges(trace: Trace, name: str) -> np.ndarray:
    """A range's events on the host, in the order of time (Kineto repeats them on the GPU; those are left out)."""
    if name not in trace.names:
        return np.zeros(0, np.int64)
    events = trace.of({"user_annotation", "cpu_op", "python_function"})
    return events[trace.name[events] == trace.names.index(name)]


def spans(
    trace: Trace, host: Host, device: Device | None, kinds: KernelKinds | None, marker: str = DENOISING_STEP
) -> Spans:
    """`marker`: the name of the steps' ranges; `device` and `kinds` are None for a trace without a GPU."""
    steps = host_ranges(trace, marker)
    stages = [(name, host_ranges(trace, name)) for name in STAGES]
    measure = _Measure(trace, host, device, kinds)
    found = []
    previous: int | None = None
    for index, event in enumerate(steps):
        span, previous = measure.span(marker, index, int(trace.start[event]), int(trace.end[event]), previous)
        found.append(span)
    others = [
        measure.span(name, index, int(trace.start[event]), int(trace.end[event]), None)[0]
        for name, events in stages
        for index, event in enumerate(events)
    ]
    every = np.concatenate([steps, *(events for _, events in stages)])
    if len(every):
        start, end = int(trace.start[every].min()), int(trace.end[every].max())
        whole, _ = measure.span("timed region", 0, start, end, start, until=end)
    else:
        whole = measure.everything()
    return Spans(tuple(found), tuple(sorted(others, key=lambda span: span.host_start_ns)), whole, not len(every))


class _Measure:
    def __init__(self, trace: Trace, host: Host, device: Device | None, kinds: KernelKinds | None):
        self.trace, self.device, self.kinds = trace, device, kinds
        self.operators = trace.start[trace.of({"cpu_op"})]
        self.own = np.concatenate(([0], np.cumsum(host.own[trace.of({"cpu_op"})])))
        self.calls = {
            "kernel_launches": trace.start[calls_named(trace, KERNEL_LAUNCH)],
            "graph_launches": trace.start[calls_named(trace, GRAPH_LAUNCH)],
            "copies": trace.start[calls_named(trace, COPY_CALL)],
        }
        if device is not None:
            self.start, self.end = trace.start[device.event], trace.end[device.event]
            known = device.launch != NONE
            self.launched = np.where(known, trace.start[device.launch], np.iinfo(np.int64).min)
            self.all = Total(self.start, self.end)
            self.order = np.argsort(self.launched, kind="stable")
            self.in_order = self.launched[self.order]
            # Where what was launched so far had ended; what has no launch here was launched before the trace began.
            counted = np.where(known[self.order], self.end[self.order], np.iinfo(np.int64).min)
            self.ended = np.maximum.accumulate(counted)

    def span(
        self, name: str, index: int, start: int, end: int, begin: int | None, until: int = 0
    ) -> tuple[Span, int | None]:
        """A span, and where its window ends. `begin`: the window's start if something else decides it; `until`: the
        least that it reaches to, whatever was launched."""
        host = (name, index, start - int(self.trace.start[0]), end - start, self._operators(start, end))
        if self.device is None:
            return Span(*host, None), None
        low, high = np.searchsorted(self.in_order, (start, end)).tolist()
        mine = self.order[low:high]
        if not len(mine):
            return Span(*host, None), begin
        if begin is None:
            begin = max(start, int(self.ended[low - 1]) if low else start)
        finish = max(begin, until, int(self.end[mine].max()))
        return Span(*host, self._device_time(mine, begin, finish, start, end)), finish

    def everything(self) -> Span:
        trace = self.trace
        start, end = int(trace.start[0]), int(trace.end.max())
        host = ("whole trace", 0, 0, end - start, self._operators(start, end + 1))
        if self.device is None:
            return Span(*host, None)
        mine = np.arange(len(self.start))
        time = self._device_time(mine, int(self.start[0]), int(self.end.max()), start, end + 1)
        return Span(*host, time)

    def _operators(self, start: int, end: int) -> int:
        low, high = np.searchsorted(self.operators, (start, end))
        return int(self.own[high] - self.own[low])

    def _device_time(self, mine: np.ndarray, begin: int, finish: int, start: int, end: int) -> DeviceTime:
        assert self.device is not None
        assert self.kinds is not None
        own = np.minimum(self.end[mine], finish) - np.maximum(self.start[mine], begin)
        foreign = self.all.within(begin, finish) - int(np.maximum(own, 0).sum())
        kinds = self.kinds.times(mine)
        busy = self.device.busy.within(begin, finish)
        calls = {
            name: int(np.searchsorted(times, end) - np.searchsorted(times, start)) for name, times in self.calls.items()
        }
        return DeviceTime(
            window_start_ns=begin - int(self.trace.start[0]),
            window_ns=finish - begin,
            busy_ns=busy,
            idle_ns=finish - begin - busy,
            overlap_ns=sum(kinds.values()) + foreign - busy,
            foreign_ns=foreign,
            kinds=kinds,
            kernels=int(self.kinds.is_kernel[mine].sum()),
            **calls,
        )
