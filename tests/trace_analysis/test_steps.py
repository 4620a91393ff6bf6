"""Steps and stages: figures worked out by hand, and properties of any trace."""

from __future__ import annotations

import random

import numpy as np
import pytest

from trace_analysis import markdown, tables
from trace_analysis.intervals import Total, Union, union
from trace_analysis.load import load
from trace_analysis.report import Analysis
from trace_analysis.steps import DeviceTime


def test_figures_worked_out_by_hand(two_steps) -> None:
    """See the fixture for the picture. Microseconds below, nanoseconds in the report."""
    report = two_steps.analyse().report
    first, second = report.steps
    # Step 0: nothing launched earlier runs beyond its host's start at 100; its last kernel ends at 260.
    # Busy 130..195 and 205..260; the norm runs beside the attention for 5.
    assert first.device == DeviceTime(
        window_start_ns=100_000,
        window_ns=160_000,
        busy_ns=120_000,
        idle_ns=40_000,
        overlap_ns=5_000,
        foreign_ns=0,
        kinds={"gemm bf16": 85_000, "attention": 20_000, "norm and pointwise": 20_000},
        kernels=4,
        kernel_launches=4,
        graph_launches=0,
        copies=0,
    )
    # Step 1: from 260 to its copy's end at 275, although the gemm of step 0 runs within its host range.
    assert second.device == DeviceTime(
        window_start_ns=260_000,
        window_ns=15_000,
        busy_ns=5_000,
        idle_ns=10_000,
        overlap_ns=0,
        foreign_ns=0,
        kinds={"copy": 5_000},
        kernels=0,
        kernel_launches=0,
        graph_launches=0,
        copies=1,
    )
    assert [(s.host_start_ns, s.host_ns) for s in report.steps] == [(100_000, 100_000), (200_000, 100_000)]
    # addmm lasts 20, its launch of 120..124 lies within: 16 of its own.
    assert [s.operators_ns for s in report.steps] == [16_000, 0]
    encoding, decoding = report.stages
    assert (encoding.name, decoding.name) == ("prompt_encoding", "decoding")
    assert encoding.device is not None
    assert decoding.device is not None
    assert (encoding.device.window_start_ns, encoding.device.window_ns, encoding.device.busy_ns) == (0, 60_000, 20_000)
    assert (decoding.device.window_start_ns, decoding.device.window_ns) == (310_000, 40_000)
    assert decoding.device.kinds == {"convolution": 20_000}
    assert report.whole.device is not None
    assert (report.whole.name, report.whole.device.window_ns) == ("timed region", 350_000)
    assert report.whole.device.busy_ns == (20 + 65 + 55 + 5 + 20) * 1000
    assert [(row.kind, row.count) for row in report.kinds or ()] == [
        ("gemm bf16", 2),
        ("attention", 1),
        ("norm and pointwise", 1),
        ("copy", 1),
    ]


def test_foreign_work_in_a_window_is_kept_apart(writer) -> None:
    writer.step(100, 100)
    writer.kernel("mine", 110, 120, 30)
    writer.kernel(
        "other", 50, 130, 40, stream=8
    )  # launched before: 20 beside mine, 20 alone, of which 20 in the window
    writer.kernel("mine", 150, 180, 10)
    (step,) = writer.analyse().report.steps
    time = step.device
    # What was launched before ends at 170: the window is 170..190, and mine's first run lies outside of it.
    assert (time.window_start_ns, time.window_ns) == (120_000, 20_000)
    assert (time.busy_ns, time.idle_ns, time.foreign_ns) == (10_000, 10_000, 0)
    assert time.overlap_ns == 30_000


def test_graph_replays_belong_to_their_launch(writer) -> None:
    writer.step(0, 100)
    writer.step(100, 100)
    for start, begin in ((10, 150), (110, 260)):
        replay = writer.call("cudaGraphLaunch", start, 20)
        for i in range(3):
            writer.run("gemm", begin + 30 * i, 25, replay, **{"graph id": 1, "graph node id": i})
    first, second = writer.analyse().report.steps
    assert (first.device.kernels, first.device.graph_launches, first.device.kernel_launches) == (3, 1, 0)
    assert (first.device.window_ns, first.device.busy_ns) == (235_000, 75_000)  # 0..235
    assert (second.device.window_start_ns, second.device.window_ns) == (235_000, 110_000)  # 235..345


def test_a_driver_call_within_a_runtime_call_counts_once(writer) -> None:
    writer.step(100, 100)
    correlation = writer.call("cudaLaunchKernel", 99, 5)
    writer.host("cuLaunchKernel", 101, 2, "cuda_driver", correlation=correlation)
    writer.run("gemm", 120, 10, correlation)
    (step,) = writer.analyse().report.steps
    assert step.device is None, "the outer call, which launches, lies before the step"


def test_foreign_marker_and_none(writer) -> None:
    writer.host("unet", 0, 50)
    writer.kernel("gemm", 10, 20, 30)
    report = writer.analyse(marker="unet").report
    assert [(s.name, s.device.window_ns) for s in report.steps] == [("unet", 50_000)]
    report = writer.analyse().report
    assert (report.steps, report.scope, report.whole.name) == ((), "trace", "whole trace")
    assert report.whole.device.window_ns == 30_000
    assert report.whole.device.kernel_launches == 1
    assert [f.name for f in report.findings] == ["no_steps"]
    assert report.median_step is None


def test_loop_that_is_one_launch(writer, command) -> None:
    """Encoding, then a loop whose steps only the GPU sees: 3 x (gemm 20, norm 5), one graph launch; a decoder."""
    writer.step(0, 50, "prompt_encoding")
    writer.kernel("gemm_bf16", 10, 20, 30)
    writer.step(100, 20, "denoising_loop")
    correlation = writer.call("cudaGraphLaunch", 105, 10)
    for i in range(3):
        writer.run("gemm_bf16", 110 + 30 * i, 20, correlation)
        writer.run("vectorized_layer_norm_kernel", 132 + 30 * i, 5, correlation)
    writer.step(130, 100, "decoding")
    writer.kernel("cudnn_convolution_fprop", 140, 210, 20)
    done = command("report", writer.write())
    assert done.returncode == 0, done.stderr
    hint = "no range denoising_step: no single steps are reported (its denoising loop is one range: --step-marker "
    assert f"{hint}denoising_loop)" in done.stdout
    report = writer.analyse().report
    assert (report.steps, report.scope) == ((), "region")
    assert report.whole.device.kernels == 8

    report = writer.analyse(marker="denoising_loop").report
    assert report.findings == ()
    (loop,) = report.steps
    assert (loop.name, loop.device.window_ns, loop.device.idle_ns) == ("denoising_loop", 97_000, 22_000)
    assert (loop.device.kernels, loop.device.graph_launches, loop.device.kernel_launches) == (6, 1, 0)
    assert loop.device.kinds == {"gemm bf16": 60_000, "norm and pointwise": 15_000}
    assert report.syncs == ()
    text = markdown.document("x", tables.report_tables(report))
    assert "| denoising_loop 0 |" in text
    assert "no range" not in text


@pytest.mark.parametrize("seed", range(40))
def test_parts_sum_to_the_whole(writer, seed: int) -> None:
    writer.random(seed)
    analysis = writer.analyse()
    # The lost copies would blank the steps: here the spans themselves are looked at.
    spans = [*analysis.spans.steps, *analysis.spans.stages, analysis.spans.whole]
    previous = None
    for span in spans:
        time = span.device
        if time is None:
            continue
        assert time.busy_ns + time.idle_ns == time.window_ns
        assert time.window_ns == sum(time.kinds.values()) + time.foreign_ns + time.idle_ns - time.overlap_ns
        assert min(time.busy_ns, time.idle_ns, time.overlap_ns, time.foreign_ns) >= 0
        if span.name == "denoising_step":
            if previous is not None:
                assert time.window_start_ns == previous
            previous = time.window_start_ns + time.window_ns
    kernels = sum(s.device.kernels for s in analysis.spans.steps if s.device)
    starts = [s.host_start_ns for s in analysis.spans.steps]
    zero = int(analysis.trace.start[0])
    last = analysis.spans.steps[-1]
    launched = [e["ts"] * 1000 - zero for e in writer.events if e["name"] == "cudaLaunchKernel"]
    inside = [t for t in launched if starts[0] <= round(t) < last.host_start_ns + last.host_ns]
    assert kernels == len(inside)


@pytest.mark.parametrize("seed", range(5))
def test_order_of_events_does_not_matter(writer, seed: int) -> None:
    writer.random(seed)
    wanted = writer.analyse().report
    shuffled = random.Random(seed).sample(writer.events, len(writer.events))
    assert Analysis(load(writer.write(events=shuffled))).report == wanted


def test_union_against_counting_points() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        start = rng.integers(0, 50, rng.integers(0, 12))
        end = start + rng.integers(0, 10, len(start))
        covered = np.zeros(70, bool)
        for low, high in zip(start, end, strict=True):
            covered[low:high] = True
        found = Union(start, end)
        assert np.all(union(start, end)[0] == found.start)
        moments = np.arange(70)
        assert np.all(found.holds(moments) == covered)
        total = Total(start, end)
        for low, high in rng.integers(0, 70, (10, 2)):
            assert found.within(low, high) == covered[low:high].sum()
            clipped = np.minimum(end, high) - np.maximum(start, low)
            assert total.within(low, high) == np.maximum(clipped, 0).sum()
            begins, ends = found.holes(low, max(low, high))
            assert (ends - begins).sum() == (~covered[low:high]).sum()
            assert all(not covered[b:e].any() for b, e in zip(begins, ends, strict=True))


@pytest.mark.parametrize("gpu", [True, False])
def test_without_steps_all_parts_are_of_the_timed_region(writer, gpu: bool) -> None:
    writer.host("aten::add", 0, 5)
    writer.step(100, 50, "decoding")
    writer.host("aten::mul", 110, 5)
    if gpu:
        writer.kernel("gemm_bf16", 2, 10, 20)  # before the region
        writer.kernel("flash_fwd", 112, 120, 10)
        writer.kernel("elementwise", 160, 170, 10)  # after it
    report = writer.analyse().report
    assert (report.scope, report.whole.name) == ("region", "timed region")
    if gpu:
        assert {row.kind: row.time_ns for row in report.kinds} == report.whole.device.kinds == {"attention": 10_000}
        assert report.gaps.idle_ns == report.whole.device.idle_ns == 40_000
    else:
        assert [row.name for row in report.operators] == ["aten::mul"]
    assert ", in the timed region" in markdown.document("x", tables.report_tables(report))


def test_without_ranges_all_parts_are_of_the_whole_trace(writer) -> None:
    writer.kernel("gemm_bf16", 2, 10, 20)
    report = writer.analyse().report
    assert report.scope == "trace"
    assert {row.kind: row.time_ns for row in report.kinds} == report.whole.device.kinds == {"gemm bf16": 20_000}
