"""Why the GPU had nothing to do: every gap cut up by what the thread that launched the next kernel was doing.

A gap ends with a kernel. Until the host's call that launched it returned, the gap is the host's, and each nanosecond
goes to the cause that the innermost events on that thread name (`_RULES`); what is left of it is the device's own
latency, up to `LATENCY_NS` a gap: a GPU that waits longer for a kernel already launched has a reason that the trace
doesn't tell. Between the kernels of a CUDA graph such latencies are the device's even while the launch still runs: it
hands over the first kernels before the last ones; only a longer gap is the launch's.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from trace_analysis.device import COPY_CALL, GRAPH_LAUNCH, KERNEL_LAUNCH, Device
from trace_analysis.host import Host, Timeline, source
from trace_analysis.load import CALLS, NONE, Trace
from trace_analysis.syncs import sync_calls

SYNC, RECOMPILATION, ALLOCATOR, GUARDS = "sync", "recompilation", "allocator", "Dynamo cache lookup and guards"
INSTANTIATION, MODULES = "graph instantiation", "module loading"
GRAPH, SCHEDULER, COPIES = "graph launch", "scheduler", "copies"
LAUNCH, OPERATOR, COMPILED, PYTHON = "kernel launch", "operator", "compiled code", "Python"
DEVICE, UNKNOWN = "device latency", "unknown"
# A cause before others in this list keeps what happens inside it: an operator within a recompilation is recompilation.
# Among the last four the innermost event decides.
CAUSES = (
    SYNC, RECOMPILATION, ALLOCATOR, GUARDS, INSTANTIATION, MODULES, GRAPH, SCHEDULER, COPIES,
    LAUNCH, OPERATOR, COMPILED, PYTHON, DEVICE, UNKNOWN,
)  # fmt: skip
_KEEPING = CAUSES.index(LAUNCH)  # so many causes keep what is inside
LATENCY_NS = 20_000  # from the return of a launch to the kernel's start, with a GPU that has nothing else to do

_PYTHON, _OPERATOR, _RANGE = (frozenset({name}) for name in ("python_function", "cpu_op", "user_annotation"))
# Categories and names of events, and the cause they stand for; the first that fits. Waits are told by `sync_calls`.
_RULES: tuple[tuple[frozenset[str], re.Pattern[str], str], ...] = (
    (CALLS, re.compile(r"cu(da)?Graph(Instantiate|Upload|ExecUpdate)"), INSTANTIATION),
    (CALLS, re.compile(r"cu(da)?(Module|Library|Link)"), MODULES),
    (CALLS, GRAPH_LAUNCH, GRAPH),
    (CALLS, KERNEL_LAUNCH, LAUNCH),
    (CALLS, COPY_CALL, COPIES),
    (
        CALLS,
        re.compile(r"cu(da)?(Malloc|Free|HostAlloc|HostRegister|Mem(Alloc|Free|GetInfo|Create|Map|Unmap|Set|Address))"),
        ALLOCATOR,
    ),
    (CALLS, re.compile(r""), LAUNCH),  # cudaFuncGetAttributes, cudaOccupancy...: what goes before a launch
    (_OPERATOR, re.compile(r"TorchDynamo Cache Lookup"), GUARDS),
    (
        _OPERATOR | _RANGE,
        re.compile(
            r".*\(dynamo_timed\)|.*compile_id=|dynamo$|entire_frame_compile|compile_attempt|bytecode_tracing|"
            r"backend_compile|inductor_compile|async_compile|create_aot_dispatcher"
        ),
        RECOMPILATION,
    ),
    (_PYTHON, re.compile(r"torch/(_dynamo/convert_frame|_inductor/compile_fx)\.py"), RECOMPILATION),
    (
        _OPERATOR | _RANGE,
        re.compile(r"Torch-Compiled Region|## Call CompiledFxGraph|Pregraph bytecode|AOTDispatcher|CompiledFunction"),
        COMPILED,
    ),
    (_PYTHON, re.compile(r"(.*/)?schedulers/scheduling_"), SCHEDULER),
    (_RANGE, re.compile(r".*scheduler", re.IGNORECASE), SCHEDULER),
    (_OPERATOR, re.compile(r"aten::(copy_|_to_copy|to)$"), COPIES),
    (_OPERATOR, re.compile(r""), OPERATOR),
    (_PYTHON | _RANGE, re.compile(r""), PYTHON),
)  # fmt: skip


@dataclass(frozen=True)
class Gap:
    """One gap of the GPU; times in nanoseconds, the start from the trace's first event.

    causes: nanoseconds by cause, adding up to `time_ns`.
    doing: the event that the launching thread was in for the longest part of the gap; with stacks its Python frame.
    after_sync: the operator or call that waited for the GPU until just before, and so emptied its queue.
    next_kernel: what ended the gap.
    """

    step: int
    start_ns: int
    time_ns: int
    causes: dict[str, int]
    doing: str | None
    after_sync: str | None
    next_kernel: str | None


@dataclass(frozen=True)
class Gaps:
    """All gaps of some windows: total nanoseconds by cause, the number of gaps, and the longest ones."""

    idle_ns: int
    causes: dict[str, int]
    count: int
    longest: tuple[Gap, ...]


class GapFinder:
    """Explains the gaps of any window of a trace."""

    def __init__(self, trace: Trace, host: Host, device: Device):
        self.trace, self.host, self.device = trace, host, device
        self.syncs = sync_calls(trace, device)
        self.cause = event_causes(trace, host, self.syncs)
        self.start = trace.start[device.event]
        first_of_launch = np.zeros(len(self.start), bool)
        first_of_launch[np.unique(device.launch, return_index=True)[1]] = True
        self.first = first_of_launch & (device.launch != NONE)
        self._spent: dict[int, tuple[Timeline, np.ndarray]] = {}

    def gaps(self, windows: Iterable[tuple[int, int, int]], top: int = 20) -> Gaps:
        """windows: number of the step, start and end in nanoseconds of the trace's clock."""
        parts = [self._window(*window) for window in windows]
        if not parts:
            return Gaps(0, {}, 0, ())
        begins, ends, numbers, causes = (np.concatenate(column) for column in zip(*parts, strict=True))
        longest = sorted(range(len(begins)), key=lambda i: (begins[i] - ends[i], begins[i]))[:top]
        return Gaps(
            idle_ns=int((ends - begins).sum()),
            causes=_named(causes.sum(axis=0)),
            count=len(begins),
            longest=tuple(self._gap(int(numbers[i]), int(begins[i]), int(ends[i]), causes[i]) for i in longest),
        )

    def _window(self, step: int, start: int, end: int) -> tuple[np.ndarray, ...]:
        """Of each gap: begin, end, step, and nanoseconds by cause [gaps, causes]."""
        begins, ends = self.device.busy.holes(start, end)
        causes = np.zeros((len(begins), len(CAUSES)), np.int64)
        following = np.searchsorted(self.start, ends, side="left")
        inside = following < len(self.start)
        following = np.minimum(following, len(self.start) - 1)
        launch = self.device.launch[following]
        known = inside & (self.start[following] == ends) & (launch != NONE)
        # Until here the host had not launched what ends the gap.
        returned = np.where(known, self.trace.end[launch], begins)
        within_graph = known & ~self.first[following] & (ends - begins <= LATENCY_NS)
        returned = np.where(within_graph, begins, returned)
        host_end = np.clip(returned, begins, ends)
        lanes = np.where(known, self.trace.lane[launch], NONE)
        for lane in np.unique(lanes[known]):
            here = np.flatnonzero(lanes == lane)
            causes[here] = self._until(int(lane), host_end[here]) - self._until(int(lane), begins[here])
        causes[:, CAUSES.index(DEVICE)] = np.where(known, np.minimum(ends - host_end, LATENCY_NS), 0)
        causes[:, CAUSES.index(UNKNOWN)] += ends - begins - causes.sum(axis=1)
        return begins, ends, np.full(len(begins), step), causes

    def _until(self, lane: int, moments: np.ndarray) -> np.ndarray:
        """Nanoseconds that a thread had spent on each cause before each moment; [moments, causes]."""
        if lane not in self._spent:
            line = self.host.timelines[lane]
            sums = np.zeros((len(line.start) + 1, len(CAUSES)), np.int64)
            causes = np.where(line.event == NONE, CAUSES.index(UNKNOWN), self.cause[line.event])
            sums[np.arange(1, len(line.start) + 1), causes] = line.end - line.start
            self._spent[lane] = line, np.cumsum(sums, axis=0)
        line, sums = self._spent[lane]
        at = np.searchsorted(line.start, moments, side="right") - 1
        found = sums[np.maximum(at, 0)].copy()
        partly = np.clip(moments - line.start[np.maximum(at, 0)], 0, (line.end - line.start)[np.maximum(at, 0)])
        event = line.event[np.maximum(at, 0)]
        cause = np.where(event == NONE, CAUSES.index(UNKNOWN), self.cause[event])
        found[np.arange(len(moments)), cause] += np.where(at >= 0, partly, 0)
        return found

    def _gap(self, step: int, begin: int, end: int, causes: np.ndarray) -> Gap:
        following = int(np.searchsorted(self.start, end, side="left"))
        kernel = doing = None
        after = None
        if following < len(self.start) and self.start[following] == end:
            kernel = self.trace.name_of(int(self.device.event[following]))
            launch = int(self.device.launch[following])
            launched_alone = self.first[following] or (launch != NONE and end - begin > LATENCY_NS)
            if launched_alone and self.trace.end[launch] > begin:  # the host hadn't launched it by then
                lane = int(self.trace.lane[launch])
                doing = self._longest(lane, begin, min(end, int(self.trace.end[launch])))
                after = self._sync_before(lane, begin, int(self.trace.start[launch]))
        zero = int(self.trace.start[0])
        return Gap(step, begin - zero, end - begin, _named(causes), doing, after, kernel)

    def _longest(self, lane: int, begin: int, end: int) -> str | None:
        line = self.host.timelines[lane]
        low, high = np.searchsorted(line.end, begin, side="right"), np.searchsorted(line.start, end, side="left")
        if low >= high:
            return None
        time = np.minimum(line.end[low:high], end) - np.maximum(line.start[low:high], begin)
        event = int(line.event[low:high][np.argmax(time)])
        if event == NONE:
            return None
        name = self.trace.name_of(event)
        place = source(self.host.frames(event)).outside_torch
        return f"{name}, in {place}" if place not in (None, name) else name

    def _sync_before(self, lane: int, begin: int, launch: int) -> str | None:
        """A wait of this thread that returned while the GPU was idle, before the launch."""
        ends = self.trace.end[self.syncs]
        for call in self.syncs[(ends >= begin) & (ends <= launch)].tolist():
            if self.trace.lane[call] == lane:
                operators = self.host.operators(call)
                return operators[0] if operators else self.trace.name_of(call)
        return None


def event_causes(trace: Trace, host: Host, syncs: np.ndarray) -> np.ndarray:
    """Of each event of the host the index in CAUSES, by its own name and those around it; int64 [n].

    syncs: the events that wait for the GPU, as `sync_calls` tells them.
    """
    pairs = np.unique(trace.category.astype(np.int64) * len(trace.names) + trace.name)
    table = np.full(len(trace.categories) * len(trace.names), CAUSES.index(UNKNOWN), np.int64)
    for pair in pairs.tolist():
        category, name = divmod(pair, len(trace.names))
        table[pair] = _cause(trace.categories[category], trace.names[name])
    own = table[trace.category.astype(np.int64) * len(trace.names) + trace.name]
    own[syncs] = CAUSES.index(SYNC)
    found, parents = own.tolist(), host.parent.tolist()
    for event, parent in enumerate(parents):  # in the order of time, so that those around come first
        if parent != NONE and found[parent] < _KEEPING and found[parent] < found[event]:
            found[event] = found[parent]
    return np.array(found, np.int64)


def _cause(category: str, name: str) -> int:
    for categories, pattern, cause in _RULES:
        if category in categories and pattern.match(name[:1000]):
            return CAUSES.index(cause)
    return CAUSES.index(UNKNOWN)


def _named(causes: np.ndarray) -> dict[str, int]:
    return {cause: int(time) for cause, time in zip(CAUSES, causes, strict=True) if time}
