"""Whole reports: of a real CPU trace of the embedded model, as text and as JSON, and of hostile names."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch

from trace_analysis import markdown, tables
from trace_analysis.host import Host
from trace_analysis.load import load
from trace_analysis.operators import OperatorTime, operator_times
from trace_analysis.report import Report, report
from trace_analysis.steps import DENOISING_STEP, STAGES
from utils import checkpoints, ranges
from utils.files import ROOT


@pytest.fixture(scope="module")
def real_trace(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, float]]:
    """A trace of the embedded model at 64x64 with 2 steps, and torch.profiler's own sums of self time, in us."""
    pipe = checkpoints.load("tiny", torch.float32, torch.device("cpu"), progress=False)
    pipe.set_progress_bar_config(disable=True)
    size: dict[str, Any] = {"height": 64, "width": 64, "num_inference_steps": 2, "guidance_scale": 0.0}

    def call() -> None:
        pipe("a red circle", max_sequence_length=64, generator=torch.Generator().manual_seed(0), **size)

    call()
    activity = torch.profiler.ProfilerActivity.CPU
    with ranges.annotate(pipe), torch.profiler.profile(activities=[activity], record_shapes=True) as profile:
        call()
    path = tmp_path_factory.mktemp("trace") / "trace.json.gz"
    profile.export_chrome_trace(str(path))
    return path, {row.key: row.self_cpu_time_total for row in profile.key_averages()}


def test_a_real_trace_of_a_cpu(real_trace: tuple[Path, dict[str, float]]) -> None:
    found = report(load(real_trace[0]))
    assert {DENOISING_STEP, *STAGES} == set(ranges.STAGES)
    assert [span.name for span in (*found.steps, *found.stages)] == [DENOISING_STEP] * 2 + list(STAGES)
    assert found.operators is not None
    assert len(found.operators) == 10
    assert "aten::addmm" in [o.name for o in found.operators[:3]]
    for step in found.steps:
        assert 0 < step.operators_ns < step.host_ns
        assert step.device is None
    assert sum(o.own_ns for o in found.operators) <= sum(s.operators_ns for s in found.steps)
    assert found.kinds is found.kernels is found.syncs is found.gaps is found.rates is None
    assert not found.has_gpu
    assert found.findings == ()
    assert sum(s.operators_ns for s in (*found.steps, *found.stages)) <= found.whole.operators_ns


def test_own_times_are_those_of_the_profiler_itself(real_trace: tuple[Path, dict[str, float]]) -> None:
    path, expected = real_trace
    trace = load(path)
    found = {o.name: o.own_ns / 1000 for o in operator_times(trace, Host(trace))}
    assert len(found) > 30
    assert {name: expected[name] for name in found} == pytest.approx(found, abs=0.5, rel=1e-3)


def test_own_times_worked_out_by_hand(writer) -> None:
    """On thread 1 linear (40) calls addmm (30), which calls copy (5) and copy (7); mul (20) follows at once. On thread
    2, at the same time as linear, add (35) calls copy (4). In the second step: mul (10)."""
    writer.step(100, 100)
    for name, start, length, thread in (
        ("linear", 110, 40, 1), ("addmm", 115, 30, 1), ("copy", 116, 5, 1), ("copy", 122, 7, 1), ("mul", 150, 20, 1),
        ("add", 112, 35, 2), ("copy", 120.5, 4, 2),
    ):  # fmt: skip
        writer.host(name, start, length, thread=thread)
    writer.host("copy", 50, 40)
    writer.step(200, 90)
    writer.host("mul", 210, 10)
    assert writer.analyse().report.operators == (
        OperatorTime("add", 1, 31_000),
        OperatorTime("mul", 2, 30_000),
        OperatorTime("addmm", 1, 18_000),
        OperatorTime("copy", 3, 16_000),
        OperatorTime("linear", 1, 10_000),
    )


def test_equal_intervals_nest_in_the_order_of_their_numbers(writer) -> None:
    writer.host("inner", 0, 10, **{"External id": 2})
    writer.host("outer", 0, 10, **{"External id": 1})
    assert {o.name: o.own_ns for o in writer.analyse().report.operators} == {"outer": 0, "inner": 10_000}


def test_blocks_by_modules_and_stages(writer) -> None:
    writer.step(0, 100)
    writer.step(0, 4, "prompt_encoding")
    writer.frame("nn.Module: FluxTransformerBlock_0", 5, 20)
    writer.frame("nn.Module: Linear_3", 8, 10)
    writer.kernel("gemm", 10, 20, 5)
    writer.frame("nn.Module: FluxSingleTransformerBlock_7", 30, 20)
    writer.kernel("gemm", 35, 40, 7)
    writer.kernel("gemm", 60, 70, 9)
    writer.step(100, 50, "decoding")
    writer.kernel("gemm", 110, 120, 5)
    kernels = writer.analyse().report.kernels
    assert [(k.block, k.time_ns) for k in kernels] == [(None, 9_000), ("single", 7_000), ("double", 5_000)]
    kernels = writer.analyse(marker="none").report.kernels
    assert [(k.block, k.time_ns) for k in kernels] == [
        (None, 9_000), ("single", 7_000), ("VAE", 5_000), ("double", 5_000),
    ]  # fmt: skip


def test_text_and_json_say_the_same(two_steps, real_trace: tuple[Path, dict[str, float]], command: Callable) -> None:
    for path in (two_steps.write(), real_trace[0]):
        text, machine = command("report", path), command("report", path, "--json")
        assert (text.returncode, machine.returncode, text.stderr, machine.stderr) == (0, 0, "", "")
        found = json.loads(machine.stdout)
        assert found["schema"] == 2
        assert set(found) == {"schema", *(field.name for field in fields(Report))}
        for step in (*found["steps"], *found["stages"]):
            figures = [f"{step[key] / 1e6:.3f}" for key in ("host_start_ns", "host_ns", "operators_ns")]
            if step["device"] is not None:
                figures += [f"{step['device'][key] / 1e6:.3f}" for key in ("window_ns", "busy_ns", "idle_ns")]
            assert any(all(f" {f} " in line for f in figures) for line in text.stdout.splitlines())
        for row in [*(found["operators"] or ()), *(found["kernels"] or ())]:
            assert f"| {row['name']}" in text.stdout


def test_names_cannot_drive_the_terminal(writer) -> None:
    names = ["\x1b[2Jevil\nline \ud800", "endless " * 10_000, "a | b\\|<script>[x](y)"]
    for i, name in enumerate(names):
        writer.host(name, 0, 1, thread=i)
    found = writer.analyse().report
    text = markdown.document("x", tables.report_tables(found))
    assert "?\\[2Jevil?line ?" in text
    assert "a \\| b\\\\\\|\\<script>\\[x](y)" in text
    assert all(line.isprintable() and len(line) < 400 for line in text.splitlines())
    assert {row["name"] for row in json.loads(found.to_json())["operators"]} == set(names)


def test_the_median_step_leaves_the_first_out(writer) -> None:
    at = 0
    for length in (500, 40, 20, 30):
        writer.step(at, length)
        writer.kernel("gemm", at + 1, at + 10, length - 10)
        at += length
    assert writer.analyse().report.median_step == 3


@pytest.mark.parametrize(
    ("lengths", "median"),
    [
        ((500, 2, 400, 1, 3, 600, 2, 500, 1, 2), 7),
        ((500, 100, 110, 90, 2500, 120, 100), 6),
    ],
    ids=["skipped", "held-up"],
)
def test_the_median_step_is_one_that_is_like_others(writer, lengths: tuple[int, ...], median: int) -> None:
    at = 0
    for length in lengths:
        writer.step(at, length)
        writer.kernel("gemm", at, at, length)
        at += length
    assert writer.analyse().report.median_step == median


def test_torch_is_not_imported() -> None:
    line = "import sys, trace_analysis.__main__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", line], cwd=ROOT).returncode == 0


def test_thousands_of_steps_and_deep_nesting_take_no_long_time(writer) -> None:
    for number in range(3000):
        writer.step(10 * number, 10)
        writer.kernel("gemm", 10 * number + 1, 10 * number + 6, 3)
    for depth in range(5000):
        writer.host("deep", depth / 1000, 30_000 - 2 * depth / 1000, thread=2)
    started = time.perf_counter()
    found = writer.analyse().report
    assert time.perf_counter() - started < 5
    assert [step.device.kernels for step in found.steps] == [1] * 3000
