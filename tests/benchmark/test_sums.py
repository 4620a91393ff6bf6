"""benchmark.sums: its operands and figures, and on a GPU what it finds."""

from __future__ import annotations

import pytest
import torch

from benchmark import sums
from recipes.quantized_linear import ROW

CPU = torch.device("cpu")


@pytest.mark.parametrize("kind", sums.KINDS)
def test_operands_are_as_long_as_the_kernel_takes_them(kind: str) -> None:
    x, weight, _ = sums.operands(kind, 512, CPU)
    lengths = x.float().norm(dim=1)
    assert (lengths <= ROW).all()
    assert (lengths > 0.85 * ROW).all()
    if kind == "along":
        products = x.float() @ weight.float().T
        assert (products.argmax(dim=1) == torch.arange(len(x))).all()


def test_figures() -> None:
    exact = torch.randn(5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = sums.figures(0.9 * exact, exact)
    assert found["too_small_by"] == pytest.approx(0.1)
    assert found["relative_error"] == pytest.approx(0.1)
    row = {"rows": "along", "depth": 3072, "sums": {"fast": found}}
    assert sums.line(row).split() == ["along", "3072", "fast", "0.1000", "+0.1000"]
    assert sums.line({"rows": "along", "depth": 3072}).split() == ["along", "3072"]


@pytest.mark.gpu
@pytest.mark.parametrize("kind", sums.KINDS)
def test_ours_are_nearer_than_fast_accumulation(kind: str) -> None:
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs Hopper")
    found = sums.measure(kind, 12288, torch.device("cuda"))["sums"]
    assert set(found) == {"fast", "promoted", "wgmma"}
    assert found["wgmma"]["relative_error"] < found["fast"]["relative_error"]
    assert all(figures["relative_error"] < 0.005 for name, figures in found.items() if name != "fast")
