"""benchmark.attention times what the fused blocks call, and says what that gives."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from benchmark import attention
from recipes import cudnn_attention


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> tuple[torch.Tensor, ...]:
    monkeypatch.setattr(attention, "HEADS", 2)
    return attention.inputs("rms_normed", 20, torch.device("cpu"))


def float8_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scalars: torch.Tensor) -> torch.Tensor:
    """`cudnn_attention_float8` in plain PyTorch, for where there is no GPU to run it."""
    by_name = dict(zip(("q", "k", "v", "s", "scale_s", "scale_o"), scalars[:, 0], strict=True))
    query, key, value = (x.float() * by_name[name] for x, name in ((q, "q"), (k, "k"), (v, "v")))
    return (attention.reference(query, key, value) * by_name["scale_o"]).to(torch.float8_e4m3fn)


def test_cudnn_in_float8_is_timed_without_a_cast_behind_it(
    small: tuple[torch.Tensor, ...], monkeypatch: pytest.MonkeyPatch, error_of: Callable
) -> None:
    monkeypatch.setattr(cudnn_attention, "cudnn_attention_float8", float8_attention)
    values, scale = attention.timed_call("cudnn_fp8", *small)()
    assert values.dtype == torch.float8_e4m3fn
    assert error_of(values.float() * scale[..., None], attention.reference(*small)) < 0.08


@pytest.mark.parametrize(
    ("name", "output", "least", "most"),
    [("native", "bfloat16", 0.001, 0.005), ("cudnn_fp8", "float8_e4m3fn", 0.03, 0.08)],
    ids=["native", "cudnn_fp8"],
)
def test_a_row_says_what_comes_out_and_its_error(
    small: tuple[torch.Tensor, ...],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    output: str,
    least: float,
    most: float,
) -> None:
    monkeypatch.setattr(cudnn_attention, "cudnn_attention_float8", float8_attention)
    monkeypatch.setattr(attention, "graph_ms", lambda calls: {"median": 0.5})
    row = {"backend": name, "tokens": 20, "norm": 2.0, **attention.measure(name, 20, 2.0, torch.device("cpu"))}
    assert row["output"] == output
    assert all(least < error < most for error in row["relative_error"].values()), row
    assert f" {output} " in attention.line(row)


def test_norms_by_their_weights() -> None:
    cpu = torch.device("cpu")
    (q, k, v), (q2, k2, v2) = (attention.inputs("rms_normed", 20, cpu, norm) for norm in (1.0, 2.0))
    for one, other in ((q, q2), (k, k2)):
        torch.testing.assert_close(other, 2 * one)
    assert torch.equal(v, v2)
