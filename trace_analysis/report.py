"""What one trace says, as dataclasses, as JSON and as text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from trace_analysis.kernels import KernelTime, kernel_times, without_launch
from trace_analysis.load import Trace
from trace_analysis.operators import OperatorTime, operator_times
from trace_analysis.ranges import DENOISING_STEP, Moments, RangeTime, named, range_times

SCHEMA = 1
TOP = 10
_NAME_WIDTH = 100  # characters of a kernel's name that are printed


@dataclass(frozen=True)
class Report:
    """Times in nanoseconds.

    scope: what operators and kernels are of: "denoising_step", or "trace" for all of a trace without such ranges.
    operators: the TOP by own time on the host, of a trace of a CPU; None of a GPU's.
    kernels: the TOP by device time, of a trace of a GPU; None of a CPU's.
    kernels_without_launch: those that belong to no range because their launch isn't in the trace.
    """

    trace: str
    ranges: tuple[RangeTime, ...]
    scope: str
    operators: tuple[OperatorTime, ...] | None
    kernels: tuple[KernelTime, ...] | None
    kernels_without_launch: int | None

    def to_json(self) -> str:
        return json.dumps({"schema": SCHEMA, **asdict(self)}, indent=1)

    def to_text(self) -> str:
        lines = [_row("range", "count", "total ms", "median ms")]
        lines += [_row(r.name, r.count, _ms(r.total_ns), _ms(r.median_ns)) for r in self.ranges]
        where = "in the denoising steps"
        if self.scope != DENOISING_STEP:
            where = f"in the whole trace, which holds no range {DENOISING_STEP}"
        if self.operators is not None:
            lines += ["", f"operators' own time on the host, {where}"]
            lines += _table("operator", [(o.name, o.count, o.own_ns) for o in self.operators])
        if self.kernels is not None:
            lines += ["", f"kernels' time on the GPU, {where}"]
            lines += _table("kernel", [(k.name, k.count, k.device_ns) for k in self.kernels])
            if self.kernels_without_launch:
                lines.append(f"{self.kernels_without_launch} kernels have no launch in the trace: no range holds them")
        return "\n".join(lines)


def report(trace: Trace) -> Report:
    """The ranges' host times, and inside the denoising steps the longest operators (CPU) or kernels (GPU)."""
    steps = named(trace, DENOISING_STEP)
    when = Moments(steps) if steps else None
    return Report(
        trace=trace.path.name,
        ranges=range_times(trace),
        scope=DENOISING_STEP if steps else "trace",
        operators=None if trace.has_gpu else operator_times(trace, when)[:TOP],
        kernels=kernel_times(trace, when)[:TOP] if trace.has_gpu else None,
        kernels_without_launch=without_launch(trace) if trace.has_gpu else None,
    )


def _table(title: str, rows: Sequence[tuple[str, int, int]]) -> list[str]:
    return [_row(title, "count", "ms"), *(_row(_printable(name), count, _ms(time)) for name, count, time in rows)]


def _row(name: str, *cells: object) -> str:
    return "".join(f"{cell!s:>12}" for cell in cells) + f"  {name}"


def _ms(nanoseconds: int) -> str:
    return f"{nanoseconds / 1e6:.3f}"


def _printable(name: str) -> str:
    """A name from the file as it may stand on a terminal: no control characters, not endless."""
    text = "".join(c if c.isprintable() else "?" for c in name[: _NAME_WIDTH + 1])
    return text if len(text) <= _NAME_WIDTH else text[: _NAME_WIDTH - 3] + "..."
