"""Waits for the GPU inside the loop."""

from __future__ import annotations

import pytest

from trace_analysis.host import Source, source
from trace_analysis.syncs import Sync

SCHEDULER = "diffusers/schedulers/scheduling_flow_match_euler_discrete.py(310): index_for_timestep"


def test_an_item_is_named_with_its_cost(writer) -> None:
    writer.step(0, 200)
    writer.frame("my_script.py(12): main", -5, 300)
    writer.frame("diffusers/pipelines/flux/pipeline_flux.py(600): __call__", -4, 280)
    writer.frame("utils/ranges.py(40): scheduled", 48, 64)
    writer.frame(SCHEDULER, 50, 60)
    writer.frame("torch/_tensor.py(1000): __hash__", 54, 50)
    writer.frame("<built-in method item of Tensor object at 0x7f>", 55, 45)
    writer.kernel("gemm", 10, 20, 60)
    writer.item(60, 40)  # the wait: 66..98, the copy on the GPU: 95..96
    writer.kernel("gemm", 120, 130, 10)
    (found,) = writer.analyse().report.syncs
    assert found == Sync(
        call="cudaStreamSynchronize",
        step=0,
        start_ns=71_000,  # the trace begins at -5
        time_ns=32_000,
        operators=("aten::item", "aten::_local_scalar_dense"),
        outside_torch=SCHEDULER,
        own="my_script.py(12): main",
        idle_after_ns=34_000,  # from the copy's end at 96 to the gemm at 130
    )


def test_a_copy_that_returns_when_it_is_done_blocks(writer) -> None:
    def copy(call: str, kind: str, start: float, duration: float, begin: float) -> None:
        writer.run(f"Memcpy {kind}", begin, 9, writer.call(call, start, duration), category="gpu_memcpy")

    writer.step(0, 300)
    copy("cudaMemcpyAsync", "DtoH (Device -> Pageable)", 20, 30, 40)
    copy("cudaMemcpyAsync", "HtoD (Pageable -> Device)", 60, 3, 61)  # goes on after the call
    copy("cudaMemcpyAsync", "DtoD (Device -> Device)", 80, 15, 82)  # done by chance when the call returns
    copy("cudaMemcpyAsync", "DtoH (Device -> Pinned)", 100, 15, 102)
    copy("cudaMemcpy", "DtoH (Device -> Pinned)", 120, 30, 125)
    writer.kernel("gemm", 160, 165, 100)
    pageable, plain = writer.analyse().report.syncs
    assert (pageable.call, pageable.start_ns, pageable.time_ns) == ("cudaMemcpyAsync", 20_000, 30_000)
    assert pageable.idle_after_ns == 12_000  # from 49 to 61
    assert (plain.call, plain.start_ns, plain.idle_after_ns) == ("cudaMemcpy", 120_000, 31_000)  # from 134 to 165


def test_a_pageable_copy_and_its_synchronisation_are_one_wait(writer) -> None:
    writer.step(0, 300)
    writer.host("aten::copy_", 10, 80)
    writer.run(
        "Memcpy DtoH (Device -> Pageable)", 30, 20, writer.call("cudaMemcpyAsync", 20, 31), category="gpu_memcpy"
    )
    writer.call("cudaStreamSynchronize", 53, 4)
    writer.call("cudaStreamSynchronize", 70, 5)  # in the same operator, but another wait
    writer.call("cudaStreamSynchronize", 95, 2)
    writer.kernel("gemm", 110, 120, 10)
    copy, *others = writer.analyse().report.syncs
    assert (copy.call, copy.operators, copy.start_ns, copy.time_ns) == (
        "cudaMemcpyAsync", ("aten::copy_",), 20_000, 37_000,
    )  # fmt: skip
    assert copy.idle_after_ns == 70_000  # from 50 to 120
    assert [sync.start_ns for sync in others] == [70_000, 95_000]


@pytest.mark.parametrize(
    "call", ["cudaDeviceSynchronize", "cudaEventSynchronize", "cudaStreamSynchronize", "cuStreamSynchronize"]
)
def test_kinds_of_waits(writer, call: str) -> None:
    writer.step(0, 100)
    writer.kernel("gemm", 5, 20, 10)
    writer.call(call, 30, 5)
    writer.call(call, 150, 5)  # outside of the loop
    writer.call("cudaStreamIsCapturing", 40, 1)
    writer.call("cudaEventRecord", 42, 1)
    writer.kernel("gemm", 32, 34, 50)  # keeps the GPU busy at the return
    (found,) = writer.analyse().report.syncs
    assert (found.call, found.operators, found.idle_after_ns) == (call, (), 0)


def test_none_without_waits(two_steps) -> None:
    assert two_steps.analyse().report.syncs == ()


@pytest.mark.parametrize(
    ("frames", "wanted"),
    [
        ([], Source(None, None)),
        (["<built-in function sleep>"], Source(None, None)),
        (["torch/nn/modules/module.py(1): f", "app/run.py(3): go"], Source("app/run.py(3): go", "app/run.py(3): go")),
        (
            ["nn.Module: Linear_3", "/usr/lib/python3.11/site-packages/torch/x.py(1): f", "threading.py(9): run"],
            Source("threading.py(9): run", None),
        ),
        (
            ["/venv/lib/python3.11/site-packages/diffusers/a.py(4): b", "/home/me/torch_things.py(1): c"],
            Source("/venv/lib/python3.11/site-packages/diffusers/a.py(4): b", "/home/me/torch_things.py(1): c"),
        ),
        (
            [f"/tmp/torchinductor_me/ab/c{'ab2' * 17}.py(9): call", "code/app.py(3): f", "app/run.py(3): go"],
            Source(f"/tmp/torchinductor_me/ab/c{'ab2' * 17}.py(9): call", "code/app.py(3): f"),
        ),
        (["json/decoder.py(3): f", "test/mine.py(1): g"], Source("json/decoder.py(3): f", "test/mine.py(1): g")),
    ],
)
def test_source_lines(frames: list[str], wanted: Source) -> None:
    assert source(frames) == wanted
