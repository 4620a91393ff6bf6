"""benchmark.linears: what it times gives what it says, on a GPU; what its rows look like."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from benchmark import linears
from benchmark.linears import Case


def test_flops_and_rows() -> None:
    one = next(case for case in linears.cases() if case.name == "qkv_mlp")
    assert one.flops == 2 * 4608 * 21504 * 3072
    both = next(case for case in linears.cases() if case.name == "mlp_up")
    assert both.flops == 2 * (4096 + 512) * 12288 * 3072
    figures = {"ms": {"median": 0.5}, "tflops": 1217.6, "sm_clock_mhz": 1400.0}
    row = {"linear": "qkv_mlp", "forms": {"wgmma": {**figures, "relative_error": 0.0266}, "apart": figures}}
    texts = linears.line(row).splitlines()
    assert texts[0].split() == ["qkv_mlp", "wgmma", "0.5000", "1218", "0.0266", "1400"]
    assert texts[1].split() == ["qkv_mlp", "apart", "0.5000", "1218", "1400"]
    assert linears.line({"linear": "out"}).strip() == "out"


@pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="needs the package triton, which isn't installed")
@pytest.mark.parametrize("case", linears.cases(), ids=lambda case: case.name)
def test_reference_of_what_scaled_mm_gives(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU, small: the error is that of rounding to bfloat16."""
    small = Case(case.name, tuple(n // 512 for n in case.tokens), case.out_features // 24, 64, case.heads // 24)
    streams = [linears.stream(small, number, torch.device("cpu"), False) for number in range(len(small.tokens))]
    out = [linears.exact(*one).bfloat16() for one in streams]
    assert 1e-4 < linears.error(small, out, streams, activated=False) < 0.003


@pytest.mark.gpu
@pytest.mark.parametrize("zeros", [False, True])
def test_small_linears(zeros: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda")
    if torch.cuda.get_device_capability(device)[0] != 9:
        pytest.skip("needs Hopper")
    for name, size in {"IMAGE": 144, "TEXT": 16, "DIM": 256}.items():  # two heads
        monkeypatch.setattr(linears, name, size)
    for case in linears.cases():
        forms = linears.measure(case, zeros, device)["forms"]
        assert set(forms) == {"scaled_mm", "apart", "wgmma"} | (set() if case.gated else {"int8"})
        told = case.plain < case.out_features and not zeros and not case.gated
        assert ("relative_error" in forms["wgmma"]) == told
        for name, figures in forms.items():
            assert figures["tflops"] > 0
            if "relative_error" in figures:
                assert 1e-4 < figures["relative_error"] < (0.004 if name == "scaled_mm" else 0.03), name
