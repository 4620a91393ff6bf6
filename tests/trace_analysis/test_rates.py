"""FLOPs and bytes of operators, rates against peaks, and shapes joined to the kernels of CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from trace_analysis import markdown, tables
from trace_analysis.costs import Cost, Shapes, cost
from trace_analysis.load import load
from trace_analysis.peaks import PEAKS
from trace_analysis.report import Analysis
from utils.errors import UsageError

GEMM = "nvjet_tst_128x256_64x4_1x2_h_bz_coopA_TNT"


def recorded(call: Callable[[], Any], operator: str, tmp_path) -> list[Cost | None]:
    """Costs of an operator's calls in a real trace of `call`."""
    with torch.no_grad(), torch.profiler.profile(record_shapes=True) as profile:
        call()
    path = tmp_path / "trace.json"
    profile.export_chrome_trace(str(path))
    trace = load(path)
    return [cost(operator, shapes) for event, shapes in trace.shapes.items() if trace.name_of(event) == operator]


BF16 = {"dtype": torch.bfloat16}
REAL: dict[str, tuple[str, Callable[[], Any], Cost]] = {
    "addmm": (
        "aten::addmm",
        lambda: torch.nn.functional.linear(torch.ones(6, 4, **BF16), torch.ones(8, 4, **BF16), torch.ones(8, **BF16)),
        Cost("gemm", "bf16", "6 x 8 x 4", 2 * 6 * 8 * 4, 2 * (8 + 6 * 4 + 8 * 4 + 6 * 8)),
    ),
    "int8": (
        "aten::_int_mm",
        lambda: torch._int_mm(torch.ones(32, 8, dtype=torch.int8), torch.ones(8, 16, dtype=torch.int8)),
        Cost("gemm", "int8", "32 x 16 x 8", 2 * 32 * 16 * 8, 32 * 8 + 8 * 16 + 4 * 32 * 16),
    ),
    "bmm": (
        "aten::bmm",
        lambda: torch.bmm(torch.ones(3, 6, 4), torch.ones(3, 4, 8)),
        Cost("gemm", "fp32", "6 x 8 x 4, 3 times", 3 * 2 * 6 * 8 * 4, 4 * 3 * (6 * 4 + 4 * 8 + 6 * 8)),
    ),
    "convolution": (
        "aten::_convolution",
        lambda: torch.nn.functional.conv2d(
            torch.ones(2, 4, 10, 12), torch.ones(8, 2, 3, 3), torch.ones(8), stride=2, padding=1, groups=2
        ),
        Cost(
            "convolution",
            "fp32",
            "2 x 2 x 10 x 12 by 8 x 3 x 3",
            2 * (2 * 8 * 5 * 6) * 2 * 9,
            4 * (2 * 4 * 10 * 12 + 8 * 2 * 9 + 8 + 2 * 8 * 5 * 6),
        ),
    ),
    "broadcast": (
        "aten::mul",
        lambda: torch.ones(2, 1, 5, **BF16) * torch.ones(3, 1, **BF16),
        Cost("memory", "bf16", "2 x 3 x 5", None, 2 * (10 + 3 + 30)),
    ),
    "copy": (
        "aten::copy_",
        lambda: torch.ones(7, 3).to(torch.bfloat16),
        Cost("memory", "bf16", "7 x 3", None, 21 * 2 + 21 * 4),
    ),
}


@pytest.mark.parametrize("case", REAL)
def test_costs_of_real_calls(tmp_path, case: str) -> None:
    operator, call, wanted = REAL[case]
    assert recorded(call, operator, tmp_path) == [wanted]


def attention(queries: int, keys: int, causal: str = "False") -> Shapes:
    dims = ((1, 24, queries, 128), (1, 24, keys, 128), (1, 24, keys, 128), (), (), ())
    return Shapes(dims, ("c10::BFloat16",) * 3 + ("Scalar",) * 3, ("", "", "", "0.", causal, "False"))


def test_flux_attention() -> None:
    """As shared figures have it: 14.9 TFLOP in the 57 attentions of one step at 4608 tokens."""
    found = cost("aten::_scaled_dot_product_flash_attention", attention(4608, 4608))
    assert found is not None
    assert found.flops == 4 * 24 * 4608 * 4608 * 128
    assert 57 * found.flops == pytest.approx(14.9e12, rel=0.01)
    assert found.bytes == 4 * 24 * 4608 * 128 * 2
    half = cost("aten::_scaled_dot_product_flash_attention", attention(4608, 4608, "True"))
    assert half is not None
    assert half.flops == found.flops // 2


OWN_IN_FLOAT8 = (
    *("cudnn_attention_float8", "attention_float8", "flash_attention_3_float8"),
    *("wgmma_attention", "wgmma_attention_beside"),
)


@pytest.mark.parametrize("operator", OWN_IN_FLOAT8)
def test_own_attention_has_its_tokens_before_its_heads(operator: str) -> None:
    dims = ((1, 4608, 24, 128), (1, 4608, 24, 128), (1, 24, 128, 4608), (3, 1, 24))
    found = cost(f"flux_fast::{operator}", Shapes(dims, ("c10::Float8_e4m3fn",) * 3 + ("float",), ("",) * 4))
    same = cost("aten::_scaled_dot_product_flash_attention", attention(4608, 4608))
    assert found is not None
    assert same is not None
    assert (found.kind, found.dtype, found.shape, found.flops) == ("attention", "fp8", same.shape, same.flops)


def test_float8_gemm_writes_bfloat16() -> None:
    types = ("c10::Float8_e4m3fn", "c10::Float8_e4m3fn", "float", "float")
    found = cost("aten::_scaled_mm", Shapes(((64, 32), (32, 16), (64, 1), (1, 16)), types, ("",) * 4))
    moved = 64 * 32 + 32 * 16 + 4 * (64 + 16) + 2 * 64 * 16
    assert found == Cost("gemm", "fp8", "64 x 16 x 32", 2 * 64 * 16 * 32, moved)


def test_own_linears() -> None:
    """Two streams count together; all results are float8, but for a gated residual's."""
    layer = ((1, 64, 32), (1, 64, 1), (1, 64, 1), (448, 32), (448, 1), (448,), (4,))
    types = ("c10::Float8_e4m3fn", "float", "float", "c10::Float8_e4m3fn", "float", "c10::BFloat16", "float")
    read = 64 * 32 + 4 * 2 * 64 + 448 * 32 + 4 * 448 + 2 * 448 + 4 * 4
    both = Shapes(layer * 2, types * 2, ("",) * 14)
    flops = 2 * 64 * 448 * 32
    expected = Cost("gemm", "fp8", "64 x 448 x 32 + 64 x 448 x 32", 2 * flops, 2 * (read + 64 * 448))
    assert cost("flux_fast::wgmma_gelu_linears", both) == expected
    norms, turns = ((128,), (128,)), ((64, 128),)
    of_norms, of_turns = ("c10::BFloat16",) * 2, ("c10::Half",)
    qkv = Shapes(
        (*layer, *norms, *turns, (), ()),
        (*types, *of_norms, *of_turns, "Scalar", "Scalar"),
        ("",) * 10 + ("1e-6", "1"),
    )
    moved = read + 2 * 2 * 128 + 2 * 64 * 128 + 64 * 448
    assert cost("flux_fast::wgmma_qkv_gelu_linear", qkv) == Cost("gemm", "fp8", "64 x 448 x 32", flops, moved)
    joint = Shapes(
        (*layer * 2, *norms * 2, (128, 128), (), ()),
        (*types * 2, *of_norms * 2, *of_turns, "Scalar", "Scalar"),
        ("",) * 19 + ("1e-6", "1"),
    )
    moved = 2 * (read + 2 * 2 * 128 + 128 * 128 + 64 * 448)
    found = cost("flux_fast::wgmma_qkv_linears", joint)
    assert found == Cost("gemm", "fp8", "64 x 448 x 32 + 64 x 448 x 32", 2 * flops, moved)
    gated = ((1, 64, 32), (1, 64, 1), (448, 32), (448, 1), (448,), (1, 448), (1, 64, 448))
    of_gated = ("c10::Float8_e4m3fn", "float", "c10::Float8_e4m3fn", "float", *("c10::BFloat16",) * 3)
    moved = 64 * 32 + 4 * 64 + 448 * 32 + 4 * 448 + 2 * 2 * 448 + 2 * 2 * 64 * 448
    one = Shapes((*gated, ()), (*of_gated, ""), ("",) * 8)
    assert cost("flux_fast::wgmma_gated_linear", one) == Cost("gemm", "fp8", "64 x 448 x 32", flops, moved)
    two = Shapes(gated * 2, of_gated * 2, ("",) * 14)
    found = cost("flux_fast::wgmma_gated_linears", two)
    assert found == Cost("gemm", "fp8", "64 x 448 x 32 + 64 x 448 x 32", 2 * flops, 2 * moved)


def test_fused_kernels_of_inductor() -> None:
    types = ("c10::BFloat16", "c10::BFloat16", "float", "Scalar")
    shapes = Shapes(((4, 8), (4, 8), (8,), ()), types, ("",) * 4)
    assert cost("triton_poi_fused_add_0", shapes) == Cost("memory", "bf16", "4 x 8", None, 160, at_most=True)
    assert cost("triton_red_fused_add_convolution_native_group_norm_7", shapes) is not None
    for template in ("addmm", "bmm", "mm", "convolution", "flex_attention"):
        assert cost(f"triton_tem_fused_{template}_0", shapes) is None
    assert cost("triton_mm", shapes) is None


@pytest.mark.parametrize(
    "shapes",
    [
        Shapes((), (), ()),
        Shapes(((1,), (2, 3)), ("float", "float"), ()),
        Shapes(((2,), (2, 3), (4, 5)), ("float",) * 3, ()),
        Shapes(((2,), (2, 3), (3, 5)), ("strange",) * 3, ()),
    ],
)
def test_shapes_that_do_not_fit_have_no_cost(shapes: Shapes) -> None:
    assert cost("aten::addmm", shapes) is None


def large_gemm(writer) -> None:
    writer.step(0, 1000)
    writer.addmm(10, 20, 4608, 21504, 3072)
    writer.kernel(GEMM, 15, 50, 800)
    writer.kernel("elementwise", 40, 850, 200)


def test_rate_against_the_gpus_peak(writer) -> None:
    large_gemm(writer)
    rates = writer.analyse().report.rates
    (row,) = rates.rows
    flops = 2 * 4608 * 21504 * 3072
    assert rates.gpu == "NVIDIA H100 80GB HBM3"
    assert (row.bound, row.count, row.time_ns) == ("compute", 1, 800_000)
    assert row.tflops == pytest.approx(flops / 800e-6 / 1e12)
    assert row.of_peak == pytest.approx(row.tflops / 989.4)
    assert row.floor_ns == rates.floor_ns == pytest.approx(flops / 989.4e12 * 1e9, abs=1)
    assert rates.kernels_above == pytest.approx(800_000 / row.floor_ns)
    assert rates.steps_above == pytest.approx(1_050_000 / row.floor_ns)  # the window: 0..1050
    assert rates.covered == pytest.approx(0.8)


def test_kernels_that_are_few_say_nothing_of_the_steps(writer) -> None:
    large_gemm(writer)
    writer.kernel("elementwise", 45, 1050, 700)
    report = writer.analyse().report
    assert report.rates.covered == pytest.approx(800 / 1700)
    assert (report.rates.kernels_above is None, report.rates.steps_above) == (False, None)
    text = markdown.document("x", tables.report_tables(report))
    assert f"its kernels took {report.rates.kernels_above:.2f} times that.\n" in text


def memory_bound(writer, operator: str, kernel: str, duration: float, start: float = 60) -> None:
    """One call on two tensors of 4608 x 3072 in bfloat16, 56.6 MB: 17 us of an H100's memory."""
    inputs = {"Input Dims": [[4608, 3072], [4608, 3072]], "Input type": ["c10::BFloat16"] * 2}
    writer.host(operator, 50, 8, **inputs)
    writer.kernel(kernel, 52, start, duration)


def test_fused_kernels_have_a_rate_at_most_and_no_floor(writer) -> None:
    large_gemm(writer)
    alone = writer.analyse().report.rates
    name = "triton_poi_fused_add_0"
    memory_bound(writer, name, name, 40, start=1050)
    report = writer.analyse().report
    gemm, fused = report.rates.rows
    assert (gemm.kind, gemm.at_most) == ("gemm", False)
    assert (fused.operator, fused.at_most, fused.bound, fused.of_peak, fused.floor_ns) == (name, True, None, None, None)
    assert fused.gbps == pytest.approx(2 * 4608 * 3072 * 2 / 40_000)
    assert report.rates.floor_ns == alone.floor_ns
    assert report.rates.covered == pytest.approx(800 / 1040)
    text = markdown.document("x", tables.report_tables(report))
    assert f"at most {fused.gbps:.1f}" in text
    assert "have no floor" in text


@pytest.mark.parametrize(("duration", "beyond"), [(40, False), (10, True)])
def test_no_share_of_the_memorys_peak_beyond_it(writer, duration: float, beyond: bool) -> None:
    writer.step(0, 100)
    memory_bound(writer, "aten::copy_", "direct_copy_kernel_cuda", duration)
    report = writer.analyse().report
    (row,) = report.rates.rows
    assert (row.bound, row.beyond) == ("memory", beyond)
    assert (row.of_peak is None, row.floor_ns is None, report.rates.floor_ns is None) == (beyond,) * 3
    assert ("ran faster than the memory" in markdown.document("x", tables.report_tables(report))) == beyond


def test_no_peak_of_an_unknown_gpu_or_dtype(writer) -> None:
    large_gemm(writer)
    writer.properties["deviceProperties"] = [{"id": 0, "name": "NVIDIA H100 80GB HBM3 MIG 1g.10gb"}]
    rates = writer.analyse().report.rates
    assert (rates.peak_source, rates.floor_ns, rates.steps_above) == (None, None, None)
    assert (rates.rows[0].of_peak, rates.rows[0].floor_ns, rates.rows[0].bound) == (None, None, None)
    assert rates.rows[0].tflops is not None
    writer.events.clear()
    writer.properties["deviceProperties"] = [{"id": 0, "name": "NVIDIA H100 80GB HBM3"}]
    writer.step(0, 100)
    writer.addmm(10, 20, 4608, 3072, 3072, "double")
    writer.kernel("dgemm", 15, 50, 10)
    (row,) = writer.analyse().report.rates.rows
    assert (row.of_peak, row.dtype) == (None, "fp64")


def test_peaks_are_plausible() -> None:
    for peak in PEAKS.values():
        assert peak.tflops["bf16"] == peak.tflops["fp16"]
        assert peak.tflops["int8"] / peak.tflops["bf16"] == pytest.approx(2, rel=0.03)
        assert peak.source


def graph_of(writer, names: list[str]) -> None:
    writer.step(0, 500)
    writer.run("Memcpy DtoD (Device -> Device)", 20, 5, writer.call("cudaMemcpyAsync", 5, 3), category="gpu_memcpy")
    replay = writer.call("cudaGraphLaunch", 10, 10)
    for i, name in enumerate(names):
        writer.run(name, 30 + 100 * i, 90, replay, **{"graph node id": i})
    writer.kernel("elementwise", 400, 450, 10)


def eager_of(writer, names: list[str]) -> None:
    writer.step(0, 500)
    for i, name in enumerate(names):
        if name == GEMM:
            writer.addmm(10 + 10 * i, 9, 128 * (i + 1), 3072, 3072)
        writer.kernel(name, 12 + 10 * i, 30 + 100 * i, 90)
    writer.kernel("elementwise", 400, 450, 10)


def test_shapes_are_joined_by_the_order_of_kernels(writers) -> None:
    graph, eager = writers("graph"), writers("eager")
    names = ["norm", GEMM, "flash_fwd_kernel", GEMM]
    graph_of(graph, names)
    eager_of(eager, names)
    assert graph.analyse().report.rates.rows == ()
    rates = graph.analyse(shapes_from=eager.analyse()).report.rates
    assert rates.shapes_from == "trace.json"
    assert sorted((row.shape, row.time_ns) for row in rates.rows) == [
        ("256 x 3072 x 3072", 90_000),
        ("512 x 3072 x 3072", 90_000),
    ]


def test_graphs_outside_the_steps_need_no_shapes(writers) -> None:
    graph, eager = writers("graph"), writers("eager")
    names = ["norm", GEMM]
    graph_of(graph, names)
    graph.step(600, 100, "decoding")
    graph.run("convolution", 620, 20, graph.call("cudaGraphLaunch", 610, 5), **{"graph node id": 9})
    eager_of(eager, names)
    (row,) = graph.analyse(shapes_from=eager.analyse()).report.rates.rows
    assert row.shape == "256 x 3072 x 3072"


def test_shapes_from_on_the_command_line(writers, command: Callable) -> None:
    graph, eager, other = writers("graph"), writers("eager"), writers("other")
    graph_of(graph, ["norm", GEMM])
    eager_of(eager, ["norm", GEMM])
    eager_of(other, [GEMM, "norm"])
    path = graph.write()
    done = command("report", path, "--shapes-from", eager.write())
    assert (done.returncode, done.stderr) == (0, "")
    assert "256 x 3072 x 3072" in done.stdout
    assert "from trace.json, by their order" in done.stdout
    done = command("report", path, "--shapes-from", other.write())
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "are not those of the graph" in done.stderr


def test_other_orders_are_refused(writers) -> None:
    graph, eager, none = writers("graph"), writers("eager"), writers("none")
    graph_of(graph, ["norm", GEMM, "flash_fwd_kernel"])
    eager_of(eager, ["norm", "flash_fwd_kernel", GEMM])
    eager_of(none, ["norm"])
    with pytest.raises(UsageError, match=r"after 1 of 3 that agree, flash_fwd_kernel instead of nvjet"):
        graph.analyse(shapes_from=eager.analyse())
    with pytest.raises(UsageError, match="no kernels of CUDA graphs"):
        none.analyse(shapes_from=eager.analyse())


def test_kernels_take_the_operator_they_were_launched_in(writer) -> None:
    writer.step(0, 100)
    writer.host("aten::linear", 5, 50)
    writer.addmm(10, 20, 64, 128, 256)
    writer.kernel("splitK_gemm", 12, 20, 10)
    writer.kernel("cublasLt::splitKreduce_kernel", 18, 30, 5)
    writer.kernel("elementwise", 40, 50, 5)
    report = Analysis(load(writer.write())).report
    (row,) = report.rates.rows
    assert (row.count, row.time_ns) == (1, 15_000)
    assert {k.kind: k.time_ns for k in report.kinds} == {"gemm bf16": 15_000, "norm and pointwise": 5_000}


@pytest.mark.parametrize("wrong", ["no steps", "no GPU", "no GPU here"])
def test_shapes_from_what_has_none_are_refused(writers, command: Callable, wrong: str) -> None:
    graph, other = writers("graph"), writers("other")
    graph_of(graph, ["norm", GEMM])
    if wrong == "no steps":
        other.kernel(GEMM, 10, 20, 5)
    else:
        other.step(0, 10)
    analyses = (graph, other) if wrong != "no GPU here" else (other, graph)
    message = "has no range denoising_step" if wrong == "no steps" else "other/trace.json has no GPU in it"
    one, reference = analyses
    with pytest.raises(UsageError, match=message):
        one.analyse(shapes_from=reference.analyse())
    done = command("report", one.write(), "--shapes-from", reference.write())
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert message in done.stderr
