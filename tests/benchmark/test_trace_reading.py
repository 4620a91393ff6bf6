"""The benchmark of the trace analysis: its traces are what they claim, and its committed result holds the limits."""

from __future__ import annotations

import json
from pathlib import Path

from benchmark.trace_reading import OUTPUT, SIZES, STEPS, measure, write_trace
from trace_analysis.load import load
from trace_analysis.report import Analysis


def test_traces_are_whole_and_as_large_as_asked(tmp_path: Path) -> None:
    path = tmp_path / "trace.json.gz"
    size = write_trace(path, 20_000)
    text_events = 20_000 // (STEPS * 7) * 7 * STEPS
    trace = load(path)
    assert trace.incomplete is None
    assert size > 200 * text_events
    assert len(trace) == text_events * 5 // 7 + STEPS  # without the arrows, with the ranges
    report = Analysis(trace).report
    assert report.findings == ()
    assert len(report.steps) == STEPS
    assert {row.kind for row in report.kinds or ()} == {"gemm bf16", "attention", "norm and pointwise"}


def test_one_size_is_measured() -> None:
    row = measure(5_000)
    assert row["steps"] == STEPS
    assert 0 < row["load_s"] + row["report_s"] <= row["wall_s"]
    assert row["peak_bytes"] > 10 * 2**20


def test_the_committed_result_keeps_to_the_limits() -> None:
    """20 s and 3 GB on 2 cores for 1.5 million events, and a cost that grows with the size."""
    rows = json.loads(OUTPUT.read_text())["rows"]
    assert tuple(row["events"] for row in rows) == SIZES
    assert rows[-1]["wall_s"] <= 20
    assert rows[-1]["unpacked_bytes"] >= 300e6
    assert rows[-1]["peak_bytes"] <= 3e9
    per_event = [(row["load_s"] + row["report_s"]) / row["events"] for row in rows]
    assert max(per_event) <= 1.35 * min(per_event)
