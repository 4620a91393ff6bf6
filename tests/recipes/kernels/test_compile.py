"""The kernels under torch.compile and AOTInductor: one graph, the same results as eagerly. On a GPU alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("triton", reason="needs the package triton, which isn't installed")

from benchmark import kernels
from benchmark.device_timing import graph_ms
from recipes.kernels import adaln, attention, cast, gelu, qkv, residual

pytestmark = pytest.mark.gpu
BATCH, TEXT, IMAGE, HEADS, HEAD_DIM = 2, 37, 100, 3, 128
DIM, TOKENS = HEADS * HEAD_DIM, TEXT + IMAGE


class AllKernels(nn.Module):
    """Every kernel once, each on what the one before gave."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.Parameter(1 + torch.randn(4, HEAD_DIM) / 4)

    def forward(self, image: Tensor, text: Tensor, modulation: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        shift, scale, gate = modulation.chunk(3, dim=1)
        values, *rows = adaln.adaln_float8(image, text, shift, scale, 1e-6)
        in_int8 = adaln.adaln_int8(image, text, shift, scale, 1e-6)
        of_streams = image, text, shift, scale, gate, scale, 1e-6
        streams = *adaln.adaln_float8_streams(*of_streams), *adaln.adaln_int8_streams(*of_streams)
        normed = adaln.adaln(image, text, shift, scale, 1e-6)
        wide = torch.cat([normed, -normed, 2 * normed], dim=2).unflatten(2, (3, HEADS, HEAD_DIM))
        wide_text, wide_image = wide.split([TEXT, IMAGE], dim=1)
        arguments = (wide_image, wide_text, *self.norm.unbind(0), cos, sin, 1e-6)
        plain = qkv.qk_norm_rotary(*arguments)
        query_key, value, descales = qkv.qkv_norm_rotary_float8(*arguments, "tokens_innermost", True)
        attended = attention.attention_float8(query_key[:, :, 0], query_key[:, :, 1], value, descales).flatten(2)
        both = gelu.concat_gelu(attended, normed)
        hidden, after = residual.gated_residual_adaln(attended, gate, normed, shift, scale, 1e-6)
        out = residual.gated_residual(after, gate, hidden[:, TEXT:], hidden[:, :TEXT])
        quantized = (
            *gelu.concat_gelu_float8(attended, normed),
            *gelu.gelu_float8(both),
            *residual.gated_residual_adaln_float8(attended, gate, normed, shift, scale, 1e-6),
            *cast.rows_float8(attended[:, TEXT:]),
        )
        return (values, *rows, *in_int8, *streams, plain, attended, both, out, *quantized)


@pytest.fixture
def inputs() -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    joint = torch.randn(BATCH, TOKENS, DIM, device="cuda", dtype=torch.bfloat16)
    angles = torch.randn(TOKENS, HEAD_DIM // 2, device="cuda").repeat_interleave(2, dim=1)
    modulation = torch.randn(BATCH, 3 * DIM, device="cuda", dtype=torch.bfloat16)
    return joint[:, TEXT:], joint[:, :TEXT], modulation, angles.cos(), angles.sin()


@pytest.fixture
def module() -> nn.Module:
    torch.manual_seed(1)
    return AllKernels().to("cuda", torch.bfloat16).requires_grad_(False)


def assert_same(got: tuple[Tensor, ...], expected: tuple[Tensor, ...], error_of: Callable) -> None:
    assert len(got) == len(expected)
    for one, other in zip(got, expected, strict=True):
        assert one.dtype == other.dtype
        assert one.shape == other.shape
        assert error_of(one.float(), other.float()) < 0.02


def test_one_graph(module: nn.Module, inputs: tuple[Tensor, ...], error_of: Callable) -> None:
    expected = module(*inputs)
    assert all(torch.isfinite(x.float()).all() for x in expected)
    torch._dynamo.reset()
    assert_same(torch.compile(module, fullgraph=True, dynamic=False)(*inputs), expected, error_of)


def test_ahead_of_time(module: nn.Module, inputs: tuple[Tensor, ...], error_of: Callable, tmp_path: Path) -> None:
    expected = module(*inputs)
    exported = torch.export.export(module, inputs, strict=False)
    package = torch._inductor.aoti_compile_and_package(exported, package_path=str(tmp_path / "all.pt2"))
    assert_same(torch._inductor.aoti_load_package(package)(*inputs), expected, error_of)


def test_fake_results_have_the_real_ones_layout(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    image, text, modulation, *_ = inputs
    shift, scale, _ = modulation.chunk(3, dim=1)
    for op, arguments in (
        (adaln.adaln_float8, (image, text, shift, scale, 1e-6)),
        (adaln.adaln_int8, (image, text, shift, scale, 1e-6)),
        (adaln.adaln_float8_streams, (image, text, shift, scale, shift, scale, 1e-6)),
        (adaln.adaln_int8_streams, (image, text, shift, scale, shift, scale, 1e-6)),
        (gelu.concat_gelu_float8, (image, image)),
        (cast.rows_float8, (image,)),
    ):
        torch.library.opcheck(op, arguments, test_utils="test_faketensor")


def test_bandwidth(capsys: pytest.CaptureFixture[str]) -> None:
    """At FLUX.1's sizes every kernel moves its bytes at a third of the memory's bandwidth or more."""
    device = torch.device("cuda")
    properties = torch.cuda.get_device_properties(device)
    # Two transfers a clock; the clock is in kHz, the bus in bits.
    peak = 2 * properties.memory_clock_rate * properties.memory_bus_width / 8 / 1e6
    for case in kernels.cases(device):
        sets = [case.arguments() for _ in range(2)]
        size = kernels.moved_bytes(sets[0]) + kernels.moved_bytes(case.fused(*sets[0]))
        ms = graph_ms([partial(case.fused, *arguments) for arguments in sets])["median"]
        rate = size / ms / 1e6
        with capsys.disabled():
            print(f"\n{case.name}: {1000 * ms:.1f} us, {rate:.0f} of {peak:.0f} GB/s", end="")
        assert rate > peak / 3, case.name
