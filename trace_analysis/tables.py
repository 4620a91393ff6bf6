"""Reports and diffs as tables of text cells, for Markdown and for HTML alike."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from trace_analysis.diff import Change, Diff, KernelChange
from trace_analysis.integrity import Finding
from trace_analysis.report import Report
from trace_analysis.steps import Span

NOT_AVAILABLE = "n/a"
_NOTE = 600  # characters of a note
_ROWS = 30  # of rates and gaps
_SHOWN = 20  # of kernels that came or went
_SCOPES = {"steps": "in the denoising steps", "region": "in the timed region", "trace": "in the whole trace"}


@dataclass(frozen=True)
class Table:
    """The first `text` columns are words, the others figures. notes: lines below."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    text: int = 1
    notes: tuple[str, ...] = ()


def report_tables(report: Report) -> Iterator[Table]:
    """In the order in which they are read; a part that isn't there or can't be trusted says why in a note."""
    yield _findings(report.findings)
    yield _spans("Denoising steps", report, report.steps)
    yield _spans("Stages", report, (*report.stages, report.whole))
    where = _SCOPES[report.scope]
    if report.operators is not None:
        rows = [(o.name, ms(o.own_ns), str(o.count)) for o in report.operators]
        yield _table(f"Operators by their own time on the host, {where}", ("operator", "ms", "count"), rows)
        return
    reasons = _reasons(report)
    yield _kinds(report, where, reasons)
    yield _kernels(report, where, reasons)
    yield _syncs(report, reasons)
    yield from _gaps(report, where, reasons)
    yield _rates(report, where, reasons)


def diff_tables(diff: Diff) -> Iterator[Table]:
    for name, findings in ((diff.before, diff.before_findings), (diff.after, diff.after_findings)):
        if findings:
            yield _findings(findings, f" of {name}")
    changes = [*diff.kinds, diff.foreign, diff.idle, diff.overlap, diff.window]
    rows = [(_LABELS.get(c.name, c.name), ms(c.before_ns), ms(c.after_ns), signed_ms(c.change_ns)) for c in changes]
    yield _table(
        "Change in one denoising step",
        ("part", "before ms", "after ms", "change ms"),
        rows,
        notes=(
            f"Step {diff.before_step} of {diff.before}, step {diff.after_step} of {diff.after}: each the median one.",
            _sum_note([*diff.kinds, diff.foreign, diff.idle], diff.overlap, diff.window),
        ),
    )
    yield _kernel_changes("Kernels that went", diff.kernels_gone)
    yield _kernel_changes("Kernels that came", diff.kernels_new)
    for title, syncs in (("Syncs that went", diff.syncs_gone), ("Syncs that came", diff.syncs_new)):
        notes = () if syncs else ("None." if syncs is not None else NOT_AVAILABLE,)
        cells = [(s.call, s.operator, s.source or "", str(s.count)) for s in syncs or ()]
        yield _table(title, ("call", "operator", "source", "count"), cells, 3, notes)


_LABELS = {"foreign": "launched elsewhere", "overlap": "overlap (subtracted)", "window": "step"}


def _sum_note(added: list[Change], overlap: Change, window: Change) -> str:
    total = sum(c.change_ns for c in added) - overlap.change_ns
    assert total == window.change_ns
    return f"The changes add up exactly: {total} ns."


def _findings(findings: tuple[Finding, ...], of: str = "") -> Table:
    rows = [(f.name, f.message, ", ".join(f.unreliable) or "nothing") for f in findings]
    notes = () if findings else ("Nothing found that can't be trusted.",)
    return _table(f"Integrity{of}", ("finding", "what", "left blank for it"), rows, 3, notes)


def _reasons(report: Report) -> dict[str, str]:
    """For each part that is left blank: why."""
    return {part: f"left blank: {f.message}" for f in reversed(report.findings) for part in f.unreliable}


def _spans(title: str, report: Report, spans: tuple[Span, ...]) -> Table:
    header: tuple[str, ...] = ("range", "host start ms", "host ms", "operators ms")
    if report.has_gpu:
        header += ("window ms", "busy ms", "idle ms", "overlap ms", "kernels", "launches", "graphs", "copies")
    rows = []
    for span in spans:
        time = span.device
        gpu: tuple[str, ...] = (NOT_AVAILABLE,) * (len(header) - 4)
        if time is not None:
            gpu = (
                ms(time.window_ns), ms(time.busy_ns), ms(time.idle_ns), ms(time.overlap_ns), str(time.kernels),
                str(time.kernel_launches), str(time.graph_launches), str(time.copies),
            )  # fmt: skip
        name = f"{span.name} {span.index}" if span.name == report.marker else span.name
        rows.append((name, ms(span.host_start_ns), ms(span.host_ns), ms(span.operators_ns), *gpu))
    notes = []
    if not spans:
        notes.append(f"There is no range {report.marker} in the trace.")
    if spans and spans == report.steps and report.median_step is not None:
        notes.append(f"The median step is number {report.median_step}.")
    if spans == report.steps and not report.has_gpu:
        notes.append("There is no GPU in this trace. Host ms but for operators ms are Python's and compiled code's.")
    notes += [reason for part, reason in _reasons(report).items() if part == "steps"]
    return _table(title, header, rows, 1, tuple(notes))


def _kinds(report: Report, where: str, reasons: dict[str, str]) -> Table:
    rows = [(k.kind, ms(k.time_ns), percent(k.share), str(k.count)) for k in report.kinds or ()]
    return _table(f"Kernels by kind, {where}", ("kind", "ms", "share", "count"), rows, 1, _why("kernels", reasons))


def _kernels(report: Report, where: str, reasons: dict[str, str]) -> Table:
    rows = [
        (k.name, k.kind, k.block or NOT_AVAILABLE, ms(k.time_ns), percent(k.share), str(k.count))
        for k in report.kernels or ()
    ]
    header = ("kernel", "kind", "block", "ms", "share", "count")
    return _table(f"Largest kernels, {where}", header, rows, 3, _why("kernels", reasons))


def _syncs(report: Report, reasons: dict[str, str]) -> Table:
    groups: dict[tuple[str, ...], list[int]] = defaultdict(lambda: [0, 0, 0])
    for sync in report.syncs or ():
        operators = " > ".join(sync.operators) or "no operator"
        group = groups[sync.call, operators, sync.outside_torch or NOT_AVAILABLE, sync.own or NOT_AVAILABLE]
        for i, value in enumerate((1, sync.time_ns, sync.idle_after_ns)):
            group[i] += value
    rows = [(*key, str(n), ms(time), ms(idle)) for key, (n, time, idle) in groups.items()]
    header = ("call", "operators", "outside PyTorch", "own code", "count", "ms", "GPU idle after ms")
    notes = _why("syncs", reasons) or (("None.",) if report.syncs == () else ())
    if report.syncs is None and not notes:
        notes = ("There are no steps to look into.",)
    return _table("Synchronisations inside the loop", header, rows, 4, notes)


def _gaps(report: Report, where: str, reasons: dict[str, str]) -> Iterator[Table]:
    gaps = report.gaps
    causes = {"unknown": 0, **(gaps.causes if gaps else {})} if gaps else {}
    rows = [
        (cause, ms(time), percent(time / gaps.idle_ns if gaps and gaps.idle_ns else 0.0))
        for cause, time in sorted(causes.items(), key=lambda item: (-item[1], item[0]))
    ]
    notes = _why("gaps", reasons)
    if gaps is not None:
        notes = (f"{gaps.count} gaps, {ms(gaps.idle_ns)} ms.",)
    yield _table(f"Why the GPU was idle, {where}", ("cause", "ms", "share"), rows, 1, notes)
    longest = [
        (
            max(gap.causes, key=lambda cause: gap.causes[cause]), gap.doing or NOT_AVAILABLE, gap.after_sync or "",
            gap.next_kernel or NOT_AVAILABLE, str(gap.step), ms(gap.start_ns), us(gap.time_ns),
        )
        for gap in (gaps.longest if gaps else ())
    ]  # fmt: skip
    header = ("cause", "the thread was in", "after a sync in", "next kernel", "step", "start ms", "us")
    yield _table("The longest gaps", header, longest, 4, _why("gaps", reasons))


def _rates(report: Report, where: str, reasons: dict[str, str]) -> Table:
    rates = report.rates
    rows = [
        (
            r.operator, r.shape, r.dtype or NOT_AVAILABLE, r.bound or NOT_AVAILABLE, str(r.count), ms(r.time_ns),
            _number(r.tflops), _number(r.gbps, r.at_most), NOT_AVAILABLE if r.of_peak is None else percent(r.of_peak),
            NOT_AVAILABLE if r.floor_ns is None else ms(r.floor_ns),
        )
        for r in (rates.rows[:_ROWS] if rates else ())
    ]  # fmt: skip
    header = ("operator", "shape", "dtype", "bound", "count", "ms", "TFLOP/s", "GB/s", "of peak", "floor ms")
    notes = list(_why("rates", reasons))
    if rates is not None:
        gpu = rates.gpu or "an unknown GPU"
        notes.append(
            f"Peaks of {gpu}: {rates.peak_source}." if rates.peak_source else f"{gpu}: no published peak known."
        )
        if rates.floor_ns is not None and rates.kernels_above is not None:
            whole = "" if rates.steps_above is None else f", the whole steps {rates.steps_above:.2f} times"
            notes.append(
                f"Floor of what is covered ({percent(rates.covered)} of the kernels' time): {ms(rates.floor_ns)} ms; "
                f"its kernels took {rates.kernels_above:.2f} times that{whole}."
            )
        if any(row.at_most for row in rates.rows[:_ROWS]):
            notes.append(
                "Fused kernels are given whole buffers: what they moved is at most that, so they have no floor."
            )
        if any(row.beyond for row in rates.rows[:_ROWS]):
            notes.append("Rows bound by memory without a share ran faster than the memory: they read from the cache.")
        if rates.shapes_from:
            notes.append(f"Shapes of the kernels in CUDA graphs from {rates.shapes_from}, by their order.")
        if len(rates.rows) > _ROWS:
            notes.append(f"{len(rates.rows) - _ROWS} shorter rows are left out; JSON has all.")
    return _table(f"Achieved rates, {where}", header, rows, 4, tuple(notes))


def _kernel_changes(title: str, kernels: tuple[KernelChange, ...]) -> Table:
    rows = [(k.name, str(k.count), ms(k.time_ns)) for k in kernels[:_SHOWN]]
    left = len(kernels) - len(rows)
    notes = (f"{left} shorter ones are left out; JSON has all.",) if left else ()
    return _table(title, ("kernel", "count", "ms"), rows, 1, notes if kernels else ("None.",))


def _why(part: str, reasons: dict[str, str]) -> tuple[str, ...]:
    return (reasons[part],) if part in reasons else ()


def _table(title: str, header: tuple[str, ...], rows: list, text: int = 1, notes: tuple[str, ...] = ()) -> Table:
    cells = tuple(tuple(map(printable, row)) for row in rows)
    return Table(title, header, cells, text, tuple(printable(note, _NOTE) for note in notes))


def printable(text: str, limit: int = 160) -> str:
    """Words from a file as they may stand on a terminal: no control characters, no more than `limit` characters."""
    shown = "".join(c if c.isprintable() else "?" for c in text[: limit + 1])
    return shown if len(shown) <= limit else shown[: limit - 3] + "..."


def ms(nanoseconds: int) -> str:
    return f"{nanoseconds / 1e6:.3f}"


def us(nanoseconds: int) -> str:
    return f"{nanoseconds / 1e3:.1f}"


def signed_ms(nanoseconds: int) -> str:
    return f"{nanoseconds / 1e6:+.3f}"


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _number(value: float | None, at_most: bool = False) -> str:
    return NOT_AVAILABLE if value is None else f"{'at most ' if at_most else ''}{value:.1f}"
