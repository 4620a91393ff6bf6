"""Two recipes compared: sums that must be exact, and what came and went."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from trace_analysis.diff import KernelChange, SyncChange, diff
from utils.errors import UsageError


def test_worked_out_by_hand(writers: Callable) -> None:
    before, after = writers("before"), writers("after")
    before.step(0, 300)
    before.item(10, 30)  # a copy on the GPU at 35..36
    before.kernel("gemm_bf16", 50, 60, 100)
    before.kernel("flash_fwd_kernel", 60, 160, 40)
    before.kernel("elementwise", 70, 210, 30)
    after.step(0, 200)
    after.kernel("e4m3_gemm", 5, 10, 60)
    after.kernel("flash_fwd_kernel", 6, 70, 40)
    after.kernel("elementwise", 7, 100, 30, stream=8)  # 10 beside the attention
    after.kernel("elementwise", 8, 135, 5)
    found = diff(before.analyse(), after.analyse())
    assert (found.window.before_ns, found.window.after_ns) == (240_000, 140_000)
    assert {c.name: c.change_ns for c in found.kinds} == {
        "gemm bf16": -100_000, "gemm fp8": 60_000, "attention": 0, "norm and pointwise": 5_000, "copy": -1_000,
    }  # fmt: skip
    # Idle before: 0..35, 36..60, 200..210; after: 0..10, 130..135.
    assert (found.idle.before_ns, found.idle.after_ns) == (69_000, 15_000)
    assert (found.overlap.before_ns, found.overlap.after_ns) == (0, 10_000)
    assert found.kernels_gone == (
        KernelChange("gemm_bf16", 1, 100_000), KernelChange("Memcpy DtoH (Device -> Pinned)", 1, 1_000),
    )  # fmt: skip
    assert found.kernels_new == (KernelChange("e4m3_gemm", 1, 60_000),)
    assert found.syncs_gone == (SyncChange("cudaStreamSynchronize", "aten::item", None, 1),)
    assert found.syncs_new == ()


@pytest.mark.parametrize("seed", range(20))
def test_changes_add_up_exactly(writers: Callable, seed: int) -> None:
    traces = []
    for name, number in (("before", seed), ("after", seed + 1000)):
        writer = writers(name)
        writer.random(number)
        writer.events = [event for event in writer.events if event["name"] != "lost"]
        analysis = writer.analyse()
        if analysis.report.median_step is None or analysis.report.steps[analysis.report.median_step].device is None:
            pytest.skip("no step of this random trace launched anything")
        traces.append(analysis)
    found = diff(*traces)
    added = [*found.kinds, found.foreign, found.idle]
    for figure in ("before_ns", "after_ns", "change_ns"):
        total = sum(getattr(change, figure) for change in added) - getattr(found.overlap, figure)
        assert total == getattr(found.window, figure)


def test_a_trace_without_a_gpu_is_refused(writers: Callable, two_steps) -> None:
    other = writers("other")
    other.step(0, 10)
    with pytest.raises(UsageError, match="has no GPU in it"):
        diff(two_steps.analyse(), other.analyse())
    with pytest.raises(UsageError, match="has no range nonsense"):
        diff(two_steps.analyse(marker="nonsense"), two_steps.analyse())


def test_on_the_command_line(two_steps, command: Callable) -> None:
    path = two_steps.write()
    text, machine = command("diff", path, path), command("diff", path, path, "--json")
    assert (text.returncode, machine.returncode, text.stderr, machine.stderr) == (0, 0, "", "")
    assert "The changes add up exactly: 0 ns." in text.stdout
    found = json.loads(machine.stdout)
    assert found["schema"] == 2
    assert found["window"] == {"name": "window", "before_ns": 15_000, "after_ns": 15_000}
