"""Why the GPU was idle: each cause planted by hand, and sums that must hold for any trace."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from trace_analysis.gaps import CAUSES, RECOMPILATION, GapFinder, Gaps, event_causes
from trace_analysis.load import load
from trace_analysis.report import Analysis
from utils.ranges import SCHEDULER_STEP


def gap_before(writer: Any, doing: list[tuple[str, str, float, float]]) -> Gaps:
    """Gaps of a step in which the GPU runs 0..10, then nothing until 110; what follows is launched in 100..104."""
    writer.step(-20, 200)
    writer.kernel("gemm", -10, 0, 10)
    for category, name, start, length in doing:
        if category == "cuda_runtime":
            writer.call(name, start, length)
        else:
            writer.host(name, start, length, category)
    writer.kernel("gemm", 100, 110, 50)
    return writer.analyse().report.gaps


# Of 100 idle us, 4 are the launch and 6 the device's; the host has 90.
CASES: dict[str, tuple[list[tuple[str, str, float, float]], dict[str, float]]] = {
    "nothing but Python": ([], {"Python": 90}),
    "a frame of Python": ([("python_function", "<built-in function sleep>", 5, 90)], {"Python": 90}),
    "a wait": ([("cuda_runtime", "cudaStreamSynchronize", 5, 25)], {"sync": 20, "Python": 70}),
    "guards": (
        [("cpu_op", "TorchDynamo Cache Lookup", 20, 40), ("cpu_op", "Torch-Compiled Region: 0/0", 60, 60)],
        {"Dynamo cache lookup and guards": 40, "compiled code": 40, "Python": 10},
    ),
    "a compiled graph's prologue": (
        [
            ("cpu_op", "Torch-Compiled Region: 3/1", 10, 100),
            ("cpu_op", "AOTDispatcher Runtime Wrapper Prologue", 12, 8),
        ],
        {"compiled code": 90},
    ),
    "a recompilation, with operators inside": (
        [
            ("cpu_op", "_compile.compile_inner (dynamo_timed)", 10, 80),
            ("cpu_op", "aten::add", 20, 30),
            ("user_annotation", "dynamo_data: compile_id=2/1", 9, 82),
        ],
        {"recompilation": 81, "Python": 9},
    ),
    "the allocator": (
        [("cpu_op", "aten::empty", 20, 60), ("cuda_runtime", "cudaMalloc", 25, 50)],
        {"allocator": 50, "operator": 10, "Python": 30},
    ),
    "a module loaded at its first kernel": (
        [
            ("cpu_op", "aten::add", 10, 60),
            ("cuda_runtime", "cuModuleLoadData", 20, 30),
            ("cuda_runtime", "cuLibraryLoadData", 55, 10),
        ],
        {"module loading": 40, "operator": 20, "Python": 30},
    ),
    "a graph made ready": (
        [("cuda_runtime", "cudaGraphInstantiateWithFlags", 20, 30), ("cuda_runtime", "cudaGraphUpload", 60, 10)],
        {"graph instantiation": 40, "Python": 50},
    ),
    "the scheduler, by its file": (
        [
            ("python_function", "diffusers/schedulers/scheduling_flow_match_euler_discrete.py(400): step", 10, 90),
            ("cpu_op", "aten::mul", 30, 20),
        ],
        {"scheduler": 90},
    ),
    "the scheduler, by its range": (
        [("user_annotation", SCHEDULER_STEP, 10, 40), ("cpu_op", "aten::mul", 30, 20)],
        {"scheduler": 40, "Python": 50},
    ),
    "copies of inputs": (
        [("cpu_op", "aten::copy_", 10, 50), ("cuda_runtime", "cudaMemcpyAsync", 20, 5)],
        {"copies": 50, "Python": 40},
    ),
    "operators": ([("cpu_op", "aten::linear", 10, 90), ("cpu_op", "aten::addmm", 20, 80)], {"operator": 90}),
    "a wait in the scheduler": (
        [
            ("python_function", "diffusers/schedulers/scheduling_x.py(400): step", 10, 90),
            ("cpu_op", "aten::item", 20, 60),
            ("cuda_runtime", "cudaStreamSynchronize", 30, 40),
        ],
        {"sync": 40, "scheduler": 50},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_each_cause(writer, case: str) -> None:
    doing, wanted = CASES[case]
    gaps = gap_before(writer, doing)
    assert gaps.count == 2  # the one before the first kernel, from the step's start, is Python and launch
    gap = max(gaps.longest, key=lambda gap: gap.start_ns)
    expected = {**wanted, "kernel launch": wanted.get("kernel launch", 0) + 4, "device latency": 6}
    assert gap.causes == {cause: round(time * 1000) for cause, time in expected.items()}
    assert gap.time_ns == 100_000


def test_a_graph_launch_and_gaps_within_the_graph(writer) -> None:
    writer.step(0, 200)
    writer.kernel("gemm", 0, 5, 5)
    replay = writer.call("cudaGraphLaunch", 40, 60)  # still launching while the first kernels run
    writer.run("gemm", 70, 10, replay)
    writer.run("gemm", 82, 10, replay)
    gaps = writer.analyse().report.gaps
    by_start = {gap.start_ns: gap.causes for gap in gaps.longest}
    assert by_start[10_000] == {"Python": 30_000, "graph launch": 30_000}
    assert by_start[80_000] == {"device latency": 2_000}


def test_what_cannot_be_known_is_unknown(writer) -> None:
    writer.step(0, 60)
    writer.kernel("gemm", 5, 10, 10)
    writer.kernel("gemm", 15, 100, 10)  # launched long before: the device's
    writer.run("lost", 50, 10, 12345)
    for i in range(200):  # so that one lost launch is no reason to distrust everything
        writer.kernel("gemm", 30, 200 + i, 1)
    gaps = writer.analyse().report.gaps
    by_start = {gap.start_ns: gap.causes for gap in gaps.longest}
    assert by_start[20_000] == {"unknown": 30_000}
    assert by_start[60_000] == {"device latency": 20_000, "unknown": 20_000}  # more than a latency can be
    assert by_start[110_000] == {"device latency": 20_000, "unknown": 70_000}
    assert gaps.causes["unknown"] == 120_000
    assert all(gap.doing is None for gap in gaps.longest if gap.start_ns in (20_000, 60_000))


def test_a_sync_before_the_gap_is_named(writer) -> None:
    writer.step(0, 300)
    writer.kernel("gemm", 5, 10, 50)
    writer.host("aten::item", 15, 50)
    writer.call("cudaStreamSynchronize", 20, 44)
    writer.kernel("gemm", 150, 160, 10)
    longest = writer.analyse().report.gaps.longest[0]
    assert (longest.start_ns, longest.after_sync) == (60_000, "aten::item")
    assert longest.causes == {
        "sync": 4_000, "operator": 1_000, "Python": 85_000, "kernel launch": 4_000, "device latency": 6_000,
    }  # fmt: skip


def test_the_waits_of_the_gaps_are_those_of_the_table(writer) -> None:
    """A blocking copy and a synchronisation are both waits, in one table as in the other."""
    writer.step(0, 300)
    writer.kernel("gemm", 5, 10, 20)
    writer.run(
        "Memcpy DtoH (Device -> Pageable)", 50, 10, writer.call("cudaMemcpyAsync", 30, 40), category="gpu_memcpy"
    )
    writer.call("cudaStreamSynchronize", 80, 20)
    writer.run("Memcpy HtoD (Pinned -> Device)", 105, 5, writer.call("cudaMemcpyAsync", 101, 3), category="gpu_memcpy")
    writer.kernel("gemm", 150, 160, 10)
    analysis = writer.analyse()
    finder = GapFinder(analysis.trace, analysis.host, analysis.device)
    zero = int(analysis.trace.start[0])
    named = {int(t) - zero for t in analysis.trace.start[finder.cause == CAUSES.index("sync")]}
    assert named == {sync.start_ns for sync in analysis.report.syncs} == {30_000, 80_000}
    by_start = {gap.start_ns: gap.causes for gap in analysis.report.gaps.longest}
    assert by_start[30_000] == {"sync": 20_000}
    assert by_start[60_000]["sync"] == 30_000  # the copy's last 10, and the synchronisation's 20


def test_causes_add_up_to_idle(two_steps) -> None:
    report = two_steps.analyse().report
    assert report.gaps.idle_ns == sum(step.device.idle_ns for step in report.steps) == sum(report.gaps.causes.values())
    assert set(report.gaps.causes) <= set(CAUSES)
    for gap in report.gaps.longest:
        assert sum(gap.causes.values()) == gap.time_ns


def test_causes_of_a_real_recompilation(tmp_path) -> None:
    """The names are those that PyTorch itself leaves in a trace."""
    double = torch.compile(lambda x: x * 2 + 1, dynamic=False)
    double(torch.ones(4))
    activity = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity]) as recorded, torch.profiler.record_function("denoising_step"):
        double(torch.ones(4))
        double(torch.ones(5))
    path = tmp_path / "trace.json"
    recorded.export_chrome_trace(str(path))
    analysis = Analysis(load(path))
    names = {analysis.trace.name_of(i) for i in range(len(analysis.trace))}
    assert {"TorchDynamo Cache Lookup", "Pregraph bytecode", "AOTDispatcher Runtime Wrapper Prologue"} <= names
    causes = event_causes(analysis.trace, analysis.host, np.zeros(0, np.int64))
    (compile_event,) = [i for i in range(len(causes)) if analysis.trace.name_of(i) == "build_guards (dynamo_timed)"]
    assert CAUSES[causes[compile_event]] == RECOMPILATION
