"""Two recipes compared, one denoising step of each: where the change in its time comes from, exactly.

change in window = sum of changes by kind + change in foreign + change in idle - change in overlap
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass

import numpy as np

from trace_analysis import integrity
from trace_analysis.integrity import Finding
from trace_analysis.kinds import KINDS
from trace_analysis.report import SCHEMA, Analysis, sync_counts
from trace_analysis.steps import DeviceTime, Span
from utils.errors import UsageError


@dataclass(frozen=True)
class Change:
    """Nanoseconds in a step of the one and of the other."""

    name: str
    before_ns: int
    after_ns: int

    @property
    def change_ns(self) -> int:
        return self.after_ns - self.before_ns


@dataclass(frozen=True)
class KernelChange:
    """Runs and nanoseconds of a kernel that only one of the steps has."""

    name: str
    count: int
    time_ns: int


@dataclass(frozen=True)
class SyncChange:
    """A wait that only one of the runs has in its steps, or has more often there; `count` is over all steps."""

    call: str
    operator: str
    source: str | None
    count: int


@dataclass(frozen=True)
class Diff:
    """before_step, after_step: the median steps, which are compared. Nothing is compared without a GPU.

    kinds: by kind of kernel, where either has any; `window` = sum of `kinds` + `foreign` + `idle` - `overlap`, in
    before, after and change alike.
    kernels_gone, kernels_new: the longest first. syncs_gone, syncs_new: None where they can't be trusted.
    """

    before: str
    after: str
    before_step: int
    after_step: int
    window: Change
    kinds: tuple[Change, ...]
    foreign: Change
    idle: Change
    overlap: Change
    kernels_gone: tuple[KernelChange, ...]
    kernels_new: tuple[KernelChange, ...]
    syncs_gone: tuple[SyncChange, ...] | None
    syncs_new: tuple[SyncChange, ...] | None
    before_findings: tuple[Finding, ...]
    after_findings: tuple[Finding, ...]

    def to_json(self) -> str:
        return json.dumps({"schema": SCHEMA, **asdict(self)}, indent=1)


def diff(before: Analysis, after: Analysis) -> Diff:
    """Compare the median steps of two traces.

    Raises:
        UsageError: one has no steps on a GPU that can be trusted.
    """
    (one, first), (other, second) = _step(before), _step(after)

    def change(name: str) -> Change:
        return Change(name.removesuffix("_ns"), getattr(first, name), getattr(second, name))

    gone, new = _kernels(before, one), _kernels(after, other)
    syncs_gone, syncs_new = _sync_changes(before, after)
    return Diff(
        before=before.report.trace,
        after=after.report.trace,
        before_step=one.index,
        after_step=other.index,
        window=change("window_ns"),
        kinds=tuple(
            Change(kind, first.kinds.get(kind, 0), second.kinds.get(kind, 0))
            for kind in KINDS
            if kind in first.kinds or kind in second.kinds
        ),
        foreign=change("foreign_ns"),
        idle=change("idle_ns"),
        overlap=change("overlap_ns"),
        kernels_gone=_only(gone, new),
        kernels_new=_only(new, gone),
        syncs_gone=syncs_gone,
        syncs_new=syncs_new,
        before_findings=before.report.findings,
        after_findings=after.report.findings,
    )


def _step(analysis: Analysis) -> tuple[Span, DeviceTime]:
    report = analysis.report
    step = report.steps[report.median_step] if report.median_step is not None else None
    if step is not None and step.device is not None:
        return step, step.device
    reason = "has no GPU in it" if not report.has_gpu else f"has no range {report.marker}"
    for finding in report.findings:
        if integrity.STEPS in finding.unreliable:
            reason = f"can't be trusted: {finding.message}"
    raise UsageError(
        f"{analysis.trace.path} {reason}: a diff compares denoising steps on a GPU; "
        "`python -m trace_analysis report` reads one trace of any kind"
    )


def _kernels(analysis: Analysis, step: Span) -> dict[str, tuple[int, int]]:
    """Runs and nanoseconds by name of what a step launched."""
    assert analysis.device is not None
    assert analysis.kernels is not None
    mine = analysis.in_spans(analysis.step_events[step.index : step.index + 1])
    found: dict[str, tuple[int, int]] = {}
    codes = analysis.trace.name[analysis.device.event[mine]]
    times = analysis.kernels.time[mine]
    for code in np.unique(codes):
        found[analysis.trace.names[code]] = int((codes == code).sum()), int(times[codes == code].sum())
    return found


def _only(these: dict[str, tuple[int, int]], others: dict[str, tuple[int, int]]) -> tuple[KernelChange, ...]:
    rows = [KernelChange(name, *figures) for name, figures in these.items() if name not in others]
    return tuple(sorted(rows, key=lambda row: (-row.time_ns, row.name)))


def _sync_changes(
    before: Analysis, after: Analysis
) -> tuple[tuple[SyncChange, ...] | None, tuple[SyncChange, ...] | None]:
    first, second = before.report.syncs, after.report.syncs
    if first is None or second is None:
        return None, None
    one, other = sync_counts(first), sync_counts(second)
    return _rows(one - other), _rows(other - one)


def _rows(counts: Counter[tuple[str, str, str | None]]) -> tuple[SyncChange, ...]:
    rows = [SyncChange(*key, count) for key, count in counts.items()]
    return tuple(sorted(rows, key=lambda row: (-row.count, row.call, row.operator, row.source or "")))
