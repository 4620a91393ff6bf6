"""A report as one HTML page that needs nothing else: a timeline of one step, bars of every step, and all tables.

There is no script in it and nothing to fetch, which its content security policy enforces; every text out of the trace
is escaped.
"""

from __future__ import annotations

from html import escape

import numpy as np

from trace_analysis.charts import Line, Piece, chart, visible
from trace_analysis.gaps import CAUSES, UNKNOWN, GapFinder
from trace_analysis.integrity import GAPS
from trace_analysis.kinds import KINDS
from trace_analysis.load import NONE
from trace_analysis.report import Analysis, Report
from trace_analysis.steps import Span
from trace_analysis.tables import Table, ms, printable, report_tables

_BARS = 60  # steps shown as bars, at most
_LONG = 40  # characters of a cell that stay on one line
_COLOURS = {
    **dict.fromkeys((f"gemm {dtype}" for dtype in ("bf16", "fp16", "fp32")), "#4269d0"),
    "gemm fp8": "#2a9d8f",
    "gemm int8": "#7cb518",
    "gemm": "#6c8be0",
    "attention": "#efb118",
    "convolution": "#8a5cc7",
    "norm and pointwise": "#ff725c",
    "quantize and cast": "#f48fb1",
    "copy": "#6b7a8f",
    "other": "#9c6b4e",
    "launched elsewhere": "#c9b79c",
    "idle": "#e3e6eb",
}
_CAUSE_COLOURS = dict(
    zip(
        CAUSES,
        ("#d1495b", "#7b2cbf", "#bc6c25", "#f4a261", "#588157", "#a47148", "#2a9d8f", "#457b9d",
         "#00b4d8", "#4361ee", "#90be6d", "#ffb703", "#adb5bd", "#ced4da", "#000000"),
        strict=True,
    )
)  # fmt: skip
_STYLE = """
body{font:14px/1.45 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif;color:#1b1f24;
  max-width:1200px;margin:24px auto;padding:0 20px;background:#fff}
h1{font-size:22px;margin:0 0 2px;overflow-wrap:anywhere} h2{font-size:16px;margin:30px 0 8px}
p{margin:6px 0;color:#57606a} .wide{overflow-x:auto}
table{border-collapse:collapse;font-size:12.5px} th,td{padding:4px 10px;text-align:right;white-space:nowrap}
th{border-bottom:1px solid #8c959f;font-weight:600} td{border-bottom:1px solid #eaeef2}
th.word,td.word{text-align:left} td.long{white-space:normal;overflow-wrap:anywhere;min-width:220px}
td.figure{font-variant-numeric:tabular-nums}
svg{display:block;font-size:12px} .legend{display:flex;flex-wrap:wrap;gap:4px 16px;font-size:12.5px;margin:8px 0}
.legend span::before{content:"";display:inline-block;width:11px;height:11px;border-radius:2px;margin-right:6px;
  background:var(--c);vertical-align:-1px}
.facts{display:flex;flex-wrap:wrap;gap:10px;margin:16px 0} .fact{background:#f6f8fa;border-radius:8px;padding:8px 14px}
.fact b{display:block;font-size:19px} .fact span{color:#57606a;font-size:12px}
"""


def page(analysis: Analysis) -> str:
    """The whole page as text."""
    report = analysis.report
    tables = list(report_tables(report))
    title = escape(printable(report.trace))
    body = [f"<h1>{title}</h1>", f"<p>{report.events} events with a duration</p>", _facts(report)]
    body += [_timeline(analysis), _bars(report), *map(_table, tables)]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        '<meta name="viewport" content="width=device-width">'
        f"<title>{title}</title><style>{_STYLE}</style></head><body>\n" + "\n".join(body) + "\n</body></html>\n"
    )


def _facts(report: Report) -> str:
    facts = []
    if report.median_step is not None:
        step = report.steps[report.median_step]
        if step.device is None:
            facts.append((f"{ms(step.host_ns)} ms", "median step on the host"))
        else:
            facts.append((f"{ms(step.device.window_ns)} ms", "median step on the GPU"))
            facts.append((f"{ms(step.device.idle_ns)} ms", "of it idle"))
    if report.syncs is not None:
        facts.append((str(len(report.syncs)), "synchronisations in the loop"))
    if report.gaps is not None and report.gaps.idle_ns:
        facts.append((f"{100 * report.gaps.causes.get(UNKNOWN, 0) / report.gaps.idle_ns:.1f} %", "of idle unexplained"))
    if report.rates is not None and report.rates.steps_above is not None:
        facts.append((f"{report.rates.steps_above:.2f} x", "the floor of kernels with shapes"))
    if report.findings:
        facts.append((str(len(report.findings)), "findings on integrity"))
    cells = "".join(f'<div class="fact"><b>{escape(b)}</b><span>{escape(s)}</span></div>' for b, s in facts)
    return f'<div class="facts">{cells}</div>'


def _timeline(analysis: Analysis) -> str:
    """One step: the GPU's streams by kind of kernel, the launching threads by what they were doing."""
    report, device = analysis.report, analysis.device
    step = None if report.median_step is None else report.steps[report.median_step]
    if step is None or step.device is None or device is None:
        return f"<h2>One denoising step</h2><p>n/a: {_without(report)}.</p>"
    zero = int(analysis.trace.start[0])
    begin = zero + step.device.window_start_ns
    finish = begin + step.device.window_ns
    streams = _streams(analysis, begin, finish)
    threads = [] if GAPS in report.unreliable else _threads(analysis, begin, finish)
    milliseconds = step.device.window_ns / 1e6
    ahead = (step.device.window_start_ns - step.host_start_ns) / 1e6
    note = f"Step {step.index}, the median one: {milliseconds:.3f} ms on the GPU"
    note += f", begun {ahead:.3f} ms after its host range." if ahead > 0 else "."
    parts = [
        f"<h2>One denoising step</h2><p>{escape(note)}</p>",
        f"<p>The GPU, by kind of kernel</p>{chart(streams, milliseconds, _COLOURS)}",
    ]
    if threads:
        drawn = chart(threads, milliseconds, _CAUSE_COLOURS)
        parts.append(f"<p>The threads that launch, at the same time, by what they do</p>{drawn}")
    return "\n".join(parts)


def _without(report: Report) -> str:
    """Why there is no step to draw."""
    return "there is no step with work on a GPU that can be trusted" if report.has_gpu else "the trace has no GPU in it"


def _streams(analysis: Analysis, begin: int, finish: int) -> list[Line]:
    trace, device, kernels = analysis.trace, analysis.device, analysis.kernels
    assert device is not None
    assert kernels is not None
    lanes = trace.lane[device.event]
    inside = (trace.end[device.event] > begin) & (trace.start[device.event] < finish)
    lines = []
    for lane in np.unique(lanes[inside]):
        rows = np.flatnonzero(inside & (lanes == lane))
        events, pieces = device.event[rows], []
        for start, length, i in visible(trace.start[events], trace.end[events], begin, finish):
            kind = KINDS[kernels.kind[rows[i]]]
            pieces.append(Piece(start, length, kind, f"{kind}: {trace.name_of(int(events[i]))}"))
        lines.append(Line(f"GPU stream {trace.lanes[lane][1]}", tuple(pieces)))
    return lines


def _threads(analysis: Analysis, begin: int, finish: int) -> list[Line]:
    trace, device = analysis.trace, analysis.device
    assert device is not None
    finder = GapFinder(trace, analysis.host, device)
    inside = (trace.end[device.event] > begin) & (trace.start[device.event] < finish) & (device.launch != NONE)
    lines = []
    for lane in np.unique(trace.lane[device.launch[inside]]):
        line = analysis.host.timelines[int(lane)]
        low, high = np.searchsorted(line.end, begin, side="right"), np.searchsorted(line.start, finish, side="left")
        busy = low + np.flatnonzero(line.event[low:high] != NONE)
        pieces = []
        for start, length, i in visible(line.start[busy], line.end[busy], begin, finish):
            event = int(line.event[busy[i]])
            cause = CAUSES[finder.cause[event]]
            pieces.append(Piece(start, length, cause, f"{cause}: {trace.name_of(event)}"))
        lines.append(Line(f"thread {trace.lanes[lane][1]}", tuple(pieces)))
    return lines


def _bars(report: Report) -> str:
    """Each step's window: time by kind and idle, stacked."""
    steps = [step for step in report.steps if step.device is not None][:_BARS]
    if not steps:
        return f"<h2>Every step</h2><p>n/a: {_without(report)}.</p>"
    parts = [_parts(step) for step in steps]
    longest = max(1, *(sum(times.values()) for times in parts))
    lines = []
    for step, times in zip(steps, parts, strict=True):
        pieces, at = [], 0
        for kind, time in times.items():
            if time:
                pieces.append(Piece(at / longest, time / longest, kind, f"{kind}: {ms(time)} ms"))
            at += time
        lines.append(Line(f"{step.name} {step.index}", tuple(pieces)))
    left = len(report.steps) - len(steps)
    notes = "<p>Where kernels run beside each other, a bar is longer than the step.</p>"
    notes += f"<p>{left} steps aren't shown.</p>" if left else ""
    return f"<h2>Every step</h2>{chart(lines, longest / 1e6, _COLOURS)}{notes}"


def _parts(step: Span) -> dict[str, int]:
    assert step.device is not None
    return {**step.device.kinds, "launched elsewhere": step.device.foreign_ns, "idle": step.device.idle_ns}


def _table(table: Table) -> str:
    parts = [f"<h2>{escape(table.title)}</h2>"]
    if table.rows:
        head = _row("th", table.header, table.text)
        rows = "".join(_row("td", row, table.text) for row in table.rows)
        parts.append(f'<div class="wide"><table><thead>{head}</thead><tbody>{rows}</tbody></table></div>')
    parts += [f"<p>{escape(note)}</p>" for note in table.notes]
    return "\n".join(parts)


def _row(tag: str, cells: tuple[str, ...], words: int) -> str:
    """The first `words` cells are text, of which long ones may be broken into lines."""
    shown = []
    for i, cell in enumerate(cells):
        kind = "figure" if i >= words else "word long" if len(cell) > _LONG else "word"
        shown.append(f'<{tag} class="{kind}">{escape(cell)}</{tag}>')
    return f"<tr>{''.join(shown)}</tr>"
