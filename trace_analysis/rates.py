"""How fast GEMMs, attention and memory-bound kernels ran, against what the GPU can do; and the floor of a step.

The floor of an operator is the larger of FLOPs / peak of its dtype and bytes / bandwidth; that of a step is the sum
over the operators whose shapes the trace holds. It is a floor for these alone: `covered` says what share of the
kernels' time they are.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass

import numpy as np

from trace_analysis.costs import Cost
from trace_analysis.device import GRAPH_LAUNCH
from trace_analysis.kernels import KernelKinds
from trace_analysis.load import NONE
from trace_analysis.peaks import PEAKS, Peak
from utils.errors import UsageError


@dataclass(frozen=True)
class Rate:
    """All calls of one operator on one shape in the steps. n/a is None.

    bound: what the floor comes from, "compute" or "memory"; of_peak: the share of that peak (0 to 1) that was reached.
    at_most: `gbps` is what was moved at most; there is no floor to such a row, and no share of the peak.
    beyond: bound by memory, and faster than that: the bytes came out of the cache, so neither is known.
    """

    kind: str
    operator: str
    shape: str
    dtype: str | None
    count: int
    time_ns: int
    tflops: float | None
    gbps: float | None
    bound: str | None
    of_peak: float | None
    floor_ns: int | None
    at_most: bool = False
    beyond: bool = False


@dataclass(frozen=True)
class Rates:
    """gpu, peak_source: None for a GPU without published peaks in the table.

    floor_ns: of all steps together, of the covered operators; kernels_above: those operators' kernels' time over it;
    steps_above: the steps' windows over it, with all that isn't covered and all idle in them; None where most isn't
    covered, as with CUDA graphs: it would say nothing.
    covered: share of the steps' kernel time (0 to 1). shapes_from: the trace that the shapes were joined from.
    """

    gpu: str | None
    peak_source: str | None
    rows: tuple[Rate, ...]
    floor_ns: int | None
    kernels_above: float | None
    steps_above: float | None
    covered: float
    shapes_from: str | None


@dataclass(frozen=True, eq=False)
class Priced:
    """Of each activity of a device the call it is part of (NONE: not known; int64 [n]), and each call's cost."""

    call: np.ndarray
    costs: dict[int, tuple[str, Cost]]
    shapes_from: str | None = None


def priced(kinds: KernelKinds) -> Priced:
    """By the shapes in the trace itself."""
    return Priced(kinds.operator, {event: (kinds.trace.name_of(event), cost) for event, cost in kinds.costs.items()})


def joined(kinds: KernelKinds, mine: np.ndarray, reference: KernelKinds, step: np.ndarray) -> Priced:
    """Shapes of kernels in CUDA graphs, from a trace without: its kernels in the same order.

    mine: chooses the activities of the steps; step: those of one step of the reference (bool [n] both).

    Raises:
        UsageError: no graph is launched in the steps, or the reference's step runs other kernels, or in another order.
    """
    trace, device = kinds.trace, kinds.device
    of_graph = np.array(
        [launch != NONE and GRAPH_LAUNCH.match(trace.name_of(launch)) is not None for launch in device.launch.tolist()],
        bool,
    )
    of_graph &= mine
    if not of_graph.any():
        raise UsageError(f"{trace.path} has no kernels of CUDA graphs in its steps: leave --shapes-from out")
    source = np.flatnonzero(step & reference.is_kernel)
    names = [reference.trace.name_of(event) for event in reference.device.event[source].tolist()]
    own = priced(kinds)
    call, costs = own.call.copy(), dict(own.costs)
    other = priced(reference)
    for launch in np.unique(device.launch[of_graph]).tolist():
        replayed = np.flatnonzero((device.launch == launch) & kinds.is_kernel)
        wanted = [trace.name_of(event) for event in device.event[replayed].tolist()]
        at = _find(wanted, names)
        if at is None:
            raise UsageError(f"--shapes-from {reference.trace.path}: {_difference(wanted, names)}")
        for activity, operator in zip(replayed, other.call[source[at : at + len(wanted)]].tolist(), strict=True):
            # Each replay of an operator is a call of its own: numbers below those of events.
            if operator != NONE:
                number = -(2 + operator + launch * len(reference.trace))
                call[activity] = number
                costs[number] = other.costs[operator]
    return Priced(call, costs, reference.trace.path.name)


def rates(kinds: KernelKinds, found: Priced, mine: np.ndarray, windows_ns: int) -> Rates:
    """Of the activities chosen by `mine` (bool [n]), which ran in windows of `windows_ns` in all."""
    gpu = _gpu(kinds)
    peak = PEAKS.get(gpu) if gpu else None
    times: dict[int, int] = defaultdict(int)
    for call, time in zip(found.call[mine].tolist(), kinds.time[mine].tolist(), strict=True):
        times[call] += time
    total = sum(times.values())
    times.pop(NONE, None)
    groups: dict[tuple[str, str, str, str | None], list[int]] = defaultdict(list)
    for call in times:
        operator, cost = found.costs[call]
        groups[cost.kind, operator, cost.shape, cost.dtype].append(call)
    rows = [
        _rate([found.costs[call] for call in calls], [times[call] for call in calls], peak) for calls in groups.values()
    ]
    floored = [row for row in rows if row.floor_ns is not None]
    floor = sum(row.floor_ns or 0 for row in floored)
    covered = sum(row.time_ns for row in floored)
    return Rates(
        gpu=gpu,
        peak_source=peak.source if peak else None,
        rows=tuple(sorted(rows, key=lambda row: (-row.time_ns, row.operator, row.shape, row.dtype or ""))),
        floor_ns=floor if floored else None,
        kernels_above=covered / floor if floor else None,
        steps_above=windows_ns / floor if floor and covered > total / 2 else None,
        covered=covered / total if total else 0.0,
        shapes_from=found.shapes_from,
    )


def _rate(costs: list[tuple[str, Cost]], times: list[int], peak: Peak | None) -> Rate:
    operator, cost = costs[0]
    time, count = sum(times), len(costs)
    flops = None if cost.flops is None else sum(each.flops or 0 for _, each in costs)
    moved = None if cost.bytes is None else sum(each.bytes or 0 for _, each in costs)
    seconds: dict[str, float] = {}
    if peak is not None and not cost.at_most:
        if flops is not None and cost.dtype in peak.tflops:
            seconds["compute"] = flops / (peak.tflops[cost.dtype] * 1e12)
        if moved is not None and (flops is None or "compute" in seconds):
            seconds["memory"] = moved / (peak.gbps * 1e9)
    bound = max(seconds, key=lambda name: seconds[name]) if seconds else None
    least = seconds[bound] * 1e9 if bound else None
    beyond = bound == "memory" and least is not None and least > time
    if beyond:
        least = None
    return Rate(
        kind=cost.kind,
        operator=operator,
        shape=cost.shape,
        dtype=cost.dtype,
        count=count,
        time_ns=time,
        tflops=flops / time / 1e3 if flops is not None and time else None,
        gbps=moved / time if moved is not None and time else None,
        bound=bound,
        of_peak=least / time if least is not None and time else None,
        floor_ns=math.ceil(least) if least is not None else None,
        at_most=cost.at_most,
        beyond=beyond,
    )


def _gpu(kinds: KernelKinds) -> str | None:
    """The device's name as the trace's `deviceProperties` have it."""
    properties = kinds.trace.properties.get("deviceProperties")
    for entry in properties if isinstance(properties, list) else ():
        if isinstance(entry, dict) and entry.get("id") == kinds.device.number:
            name = entry.get("name")
            return name if isinstance(name, str) else None
    return None


def _find(wanted: list[str], names: list[str]) -> int | None:
    """Where `wanted` lies in `names` in one piece, the first place."""
    starts = (i for i, name in enumerate(names[: len(names) - len(wanted) + 1]) if name == wanted[0])
    return next((i for i in starts if names[i : i + len(wanted)] == wanted), None) if wanted else None


def _difference(wanted: list[str], names: list[str]) -> str:
    """Where the longest match ends, in words."""
    best, at = 0, 0
    for i in range(len(names)):
        same = 0
        while same < len(wanted) and i + same < len(names) and wanted[same] == names[i + same]:
            same += 1
        if same > best:
            best, at = same, i
    there = names[at + best][:60] if at + best < len(names) else "nothing more"
    missing = wanted[best][:60] if best < len(wanted) else "nothing more"
    agree = f"after {best} of {len(wanted)} that agree"
    return f"its kernels are not those of the graph: {agree}, {there} instead of {missing}"
