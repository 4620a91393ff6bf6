"""What one trace says, as dataclasses and as JSON."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass, replace

import numpy as np

from trace_analysis import integrity
from trace_analysis.device import Device, device
from trace_analysis.gaps import GapFinder, Gaps
from trace_analysis.host import Host
from trace_analysis.integrity import Finding
from trace_analysis.intervals import Union
from trace_analysis.kernels import TOP, KernelKinds, KernelTime, KindTime, blocks
from trace_analysis.load import NONE, Trace
from trace_analysis.operators import OperatorTime, operator_times
from trace_analysis.rates import Priced, Rates, joined, priced, rates
from trace_analysis.steps import DENOISING_STEP, STAGES, Span, Spans, host_ranges, spans
from trace_analysis.syncs import Sync, syncs
from utils.errors import UsageError

SCHEMA = 2


@dataclass(frozen=True)
class Report:
    """Times are integer nanoseconds, starts count from the trace's first event.

    marker: the name of the steps' ranges. scope: what kinds, kernels, operators, gaps and rates are of: "steps";
    without steps "region", from the first stage to the end of the last; without either "trace", all of it.
    median_step: index of the step with the median device window (host time without a GPU), the first one left out
    where there are three or more, and those that took less than a twentieth of the second longest: they were skipped.
    operators: the TOP by own time on the host, of a trace without a GPU; None of one with.
    kinds, kernels, syncs, gaps, rates: None of a trace without a GPU, and where `findings` call them unreliable.
    """

    trace: str
    marker: str
    scope: str
    events: int
    has_gpu: bool
    findings: tuple[Finding, ...]
    steps: tuple[Span, ...]
    stages: tuple[Span, ...]
    whole: Span
    median_step: int | None
    operators: tuple[OperatorTime, ...] | None
    kinds: tuple[KindTime, ...] | None
    kernels: tuple[KernelTime, ...] | None
    syncs: tuple[Sync, ...] | None
    gaps: Gaps | None
    rates: Rates | None

    @property
    def unreliable(self) -> frozenset[str]:
        return frozenset(part for finding in self.findings for part in finding.unreliable)

    def to_json(self) -> str:
        return json.dumps({"schema": SCHEMA, **asdict(self)}, indent=1)


class Analysis:
    """A trace with everything that its report, its page and its comparison with another one are made from.

    marker: the name of the ranges around denoising steps.
    shapes_from: a trace without CUDA graphs, for the shapes of the kernels in this one's.

    Raises:
        UsageError: `shapes_from` has no steps on a GPU, or its kernels are not in the order of the graph's.
    """

    def __init__(self, trace: Trace, marker: str = DENOISING_STEP, shapes_from: Analysis | None = None):
        self.trace, self.marker = trace, marker
        self.host = Host(trace)
        self.device: Device | None = device(trace)
        self.kernels = None if self.device is None else KernelKinds(trace, self.host, self.device)
        self.step_events = host_ranges(trace, marker)
        self.spans: Spans = spans(trace, self.host, self.device, self.kernels, marker)
        self.report = self._report(shapes_from)

    def _scope(self) -> Union:
        """Where on the host what the report is of begins."""
        zero = int(self.trace.start[0])
        if len(self.step_events):
            return Union(self.trace.start[self.step_events], self.trace.end[self.step_events])
        start = zero + self.spans.whole.host_start_ns
        # A trace's last event may have no duration: the whole trace takes it in.
        return Union(np.array([start]), np.array([start + self.spans.whole.host_ns + self.spans.everything]))

    def in_spans(self, events: np.ndarray) -> np.ndarray:
        """Which of the device's activities were launched in these ranges; bool [n]."""
        return self._launched_in(Union(self.trace.start[events], self.trace.end[events]))

    def _launched_in(self, ranges: Union) -> np.ndarray:
        assert self.device is not None
        known = self.device.launch != NONE
        launched = np.where(known, self.trace.start[self.device.launch], np.iinfo(np.int64).min)
        return ranges.holds(launched)

    def windows(self, steps: tuple[Span, ...]) -> list[tuple[int, int, int]]:
        """Index, start and end on the trace's clock of the device windows of these steps."""
        zero = int(self.trace.start[0])
        return [
            (s.index, zero + s.device.window_start_ns, zero + s.device.window_start_ns + s.device.window_ns)
            for s in steps
            if s.device is not None
        ]

    def _report(self, shapes_from: Analysis | None) -> Report:
        trace, steps = self.trace, self.step_events
        found = integrity.findings(trace, self.device, steps, self.marker)
        bad = {part for finding in found for part in finding.unreliable}
        shown = self.spans.steps, self.spans.stages, (self.spans.whole,)
        if integrity.STEPS in bad:
            shown = tuple(tuple(replace(span, device=None) for span in each) for each in shown)  # type: ignore[assignment]
        return Report(
            trace=trace.path.name,
            marker=self.marker,
            scope="steps" if len(steps) else "trace" if self.spans.everything else "region",
            events=len(trace),
            has_gpu=self.device is not None,
            findings=found,
            steps=shown[0],
            stages=shown[1],
            whole=shown[2][0],
            median_step=_median_step(shown[0]),
            operators=None if self.device else operator_times(trace, self.host, self._scope())[:TOP],
            **self._gpu_parts(bad, shapes_from),
        )

    def _gpu_parts(self, bad: set[str], shapes_from: Analysis | None) -> dict:
        """The report's fields that need a GPU; None for those that can't be had."""
        parts: dict = dict.fromkeys(("kinds", "kernels", "syncs", "gaps", "rates"))
        if shapes_from is not None:
            self._check_shapes_from(shapes_from)
        if self.device is None or self.kernels is None:
            return parts
        trace, steps = self.trace, self.step_events
        everything = np.ones(len(self.device.event), bool)  # what has no launch in the trace, too
        mine = everything if self.spans.everything else self._launched_in(self._scope())
        windows = self.windows(self.spans.steps if len(steps) else (self.spans.whole,))
        if integrity.KERNELS not in bad:
            stages = [
                (name, int(trace.start[event]), int(trace.end[event]))
                for name in STAGES
                for event in host_ranges(trace, name)
            ]
            parts["kinds"] = self.kernels.kind_table(mine)
            parts["kernels"] = self.kernels.largest(mine, blocks(trace, self.host, self.device, stages))
        if integrity.SYNCS not in bad and len(steps):
            parts["syncs"] = syncs(trace, self.host, self.device, steps)
        if integrity.GAPS not in bad:
            finder = GapFinder(trace, self.host, self.device)
            parts["gaps"] = finder.gaps(windows)
        if integrity.RATES not in bad:
            windows_ns = sum(end - start for _, start, end in windows)
            parts["rates"] = rates(self.kernels, self._priced(mine, shapes_from), mine, windows_ns)
        return parts

    def _check_shapes_from(self, other: Analysis) -> None:
        if self.device is None:
            raise UsageError(f"{self.trace.path} has no GPU in it: leave --shapes-from out")
        if other.device is None:
            raise UsageError(f"--shapes-from {other.trace.path} has no GPU in it: give a trace of a GPU")
        if not len(other.step_events):
            raise UsageError(
                f"--shapes-from {other.trace.path} has no range {other.marker}: give a trace with steps, "
                "or their name with --step-marker"
            )

    def _priced(self, mine: np.ndarray, shapes_from: Analysis | None) -> Priced:
        assert self.kernels is not None
        if shapes_from is None:
            return priced(self.kernels)
        assert shapes_from.kernels is not None
        last = shapes_from.step_events[-1:]
        return joined(self.kernels, mine, shapes_from.kernels, shapes_from.in_spans(last))


def report(trace: Trace, marker: str = DENOISING_STEP) -> Report:
    return Analysis(trace, marker).report


def sync_counts(found: tuple[Sync, ...]) -> Counter[tuple[str, str, str | None]]:
    """How often each wait occurs: by call, outermost operator and source line."""
    return Counter((s.call, s.operators[0] if s.operators else "", s.own or s.outside_torch) for s in found)


def _median_step(steps: tuple[Span, ...]) -> int | None:
    """The lower one of two in the middle."""
    counted = steps[1:] if len(steps) > 2 else steps
    measured = [s for s in counted if s.device is not None] or list(counted)

    def length(step: Span) -> int:
        return step.device.window_ns if step.device else step.host_ns

    ordered = sorted(measured, key=lambda s: (length(s), s.index))
    long = length(ordered[-2:][0]) if ordered else 0  # the longest may be one that something else held up
    ordered = [s for s in ordered if 20 * length(s) >= long]
    return ordered[(len(ordered) - 1) // 2].index if ordered else None
