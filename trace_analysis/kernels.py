"""Kernels by kind and by name: time, share, count, and the block of the model they belong to."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from trace_analysis.costs import Cost, cost
from trace_analysis.device import Device
from trace_analysis.host import Host
from trace_analysis.kinds import KINDS, kind_of, with_dtype
from trace_analysis.load import NONE, Trace

TOP = 10
_BLOCKS = (("nn.Module: FluxTransformerBlock", "double"), ("nn.Module: FluxSingleTransformerBlock", "single"))


@dataclass(frozen=True)
class KindTime:
    """All kernels of one kind: nanoseconds, and their share of the GPU's time (0 to 1)."""

    kind: str
    time_ns: int
    share: float
    count: int


@dataclass(frozen=True)
class KernelTime:
    """All runs of one kernel. block: "double", "single", "VAE", "text encoders", or None where it can't be told."""

    name: str
    kind: str
    block: str | None
    time_ns: int
    share: float
    count: int


class KernelKinds:
    """Of each of a device's kernels and copies: its kind, the operator that launched it, and what that costs.

    operator: index of the innermost operator around the launch whose cost is known, or NONE; int64 [n].
    """

    def __init__(self, trace: Trace, host: Host, device: Device):
        self.trace, self.host, self.device = trace, host, device
        self.costs: dict[int, Cost] = {}
        known: dict[tuple[int, int], Cost | None] = {}  # by name and by shapes, of which equal ones are one object
        for event, shapes in trace.shapes.items():
            key = int(trace.name[event]), id(shapes)
            if key not in known:
                known[key] = cost(trace.name_of(event), shapes)
            if (found := known[key]) is not None:
                self.costs[event] = found
        self.operator = self._operators()
        self.is_kernel = trace.category[device.event] == _code(trace, "kernel")
        codes = trace.name[device.event]
        by_name = {int(code): kind_of(trace.names[code]) for code in np.unique(codes)}
        kinds = [
            with_dtype(by_name[code], self._dtype(operator))
            for code, operator in zip(codes.tolist(), self.operator.tolist(), strict=True)
        ]
        self.kind = np.array([KINDS.index(kind) for kind in kinds], np.int64)
        self.time = trace.end[device.event] - trace.start[device.event]

    def times(self, mine: np.ndarray) -> dict[str, int]:
        """Nanoseconds by kind of the activities chosen by `mine` (bool [n], or indices), in the order of KINDS."""
        sums = np.zeros(len(KINDS), np.int64)
        np.add.at(sums, self.kind[mine], self.time[mine])
        return {kind: int(time) for kind, time in zip(KINDS, sums, strict=True) if time}

    def kind_table(self, mine: np.ndarray) -> tuple[KindTime, ...]:
        """The longest kind first."""
        times, total = self.times(mine), int(self.time[mine].sum())
        counts = np.bincount(self.kind[mine], minlength=len(KINDS))
        rows = [
            KindTime(kind, time, time / total if total else 0.0, int(counts[KINDS.index(kind)]))
            for kind, time in times.items()
        ]
        return tuple(sorted(rows, key=lambda row: (-row.time_ns, row.kind)))

    def largest(self, mine: np.ndarray, blocks: Iterable[str | None], top: int = TOP) -> tuple[KernelTime, ...]:
        """The kernels with the most time; `blocks`: of each activity, as `Blocks` tells them."""
        total = int(self.time[mine].sum())
        sums: dict[tuple[int, int, str | None], list[int]] = {}
        rows = zip(
            mine.tolist(), self.trace.name[self.device.event].tolist(), self.kind.tolist(), blocks, self.time.tolist(),
            strict=True,
        )  # fmt: skip
        for chosen, name, kind, block, time in rows:
            if chosen:
                entry = sums.setdefault((name, kind, block), [0, 0])
                entry[0] += time
                entry[1] += 1
        found = [
            KernelTime(self.trace.names[name], KINDS[kind], block, time, time / total if total else 0.0, count)
            for (name, kind, block), (time, count) in sums.items()
        ]
        return tuple(sorted(found, key=lambda row: (-row.time_ns, row.name, row.block or ""))[:top])

    def _operators(self) -> np.ndarray:
        nearest: list[int] = []  # of each event
        for event, parent in enumerate(self.host.parent.tolist()):  # in the order of time: those around come first
            nearest.append(event if event in self.costs else NONE if parent == NONE else nearest[parent])
        nearest.append(NONE)  # what NONE as an index finds
        return np.array(nearest, np.int64)[self.device.launch]

    def _dtype(self, operator: int) -> str | None:
        return self.costs[operator].dtype if operator != NONE else None


def blocks(trace: Trace, host: Host, device: Device, stages: Iterable[tuple[str, int, int]]) -> list[str | None]:
    """Of each activity the part of the model that launched it: by the modules on the stack, else by the stage.

    stages: name, start and end on the host, in nanoseconds of the trace's clock.
    """
    launched = np.where(device.launch == NONE, np.iinfo(np.int64).min, trace.start[device.launch])
    found: list[str | None] = [None] * len(launched)
    for name, start, end in stages:
        block = {"decoding": "VAE", "prompt_encoding": "text encoders"}.get(name)
        for i in np.flatnonzero((launched >= start) & (launched < end)).tolist():
            found[i] = block
    if "python_function" in trace.categories:
        of_event: dict[int, str | None] = {NONE: None}
        for i, launch in enumerate(device.launch.tolist()):
            found[i] = _block(trace, host, launch, of_event) or found[i]
    return found


def _block(trace: Trace, host: Host, event: int, known: dict[int, str | None]) -> str | None:
    chain = []
    while event not in known:
        name = trace.name_of(event)
        here = next((block for prefix, block in _BLOCKS if name.startswith(prefix)), None)
        if here is not None:
            known[event] = here
            break
        chain.append(event)
        event = int(host.parent[event])
    for passed in chain:
        known[passed] = known[event]
    return known[event]


def _code(trace: Trace, category: str) -> int:
    return trace.categories.index(category) if category in trace.categories else NONE
