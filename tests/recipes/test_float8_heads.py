"""Casts of query, key and value to float8."""

from __future__ import annotations

import pytest
import torch

from recipes.float8_heads import LONGEST, to_float8, to_float8_by_norm, tokens_innermost


@pytest.mark.parametrize("per_head", [True, False])
def test_to_float8(per_head: bool) -> None:
    x = torch.randn(2, 5, 3, 8) * torch.tensor([1e-3, 1.0, 1e3])[None, None, :, None]
    x[1, :, 0] = 0  # a head without a scale
    scaled, descale = to_float8(x, per_head)
    assert scaled.dtype == torch.float8_e4m3fn
    assert descale.shape == (2, 3)
    assert descale.dtype == torch.float32
    assert descale.unique().numel() == (6 if per_head else 1)
    restored = scaled.float() * descale[:, None, :, None]
    # e4m3 has 3 bits of mantissa: half a unit in the last place is 1/16 of the value; below 2^-6 it is subnormal.
    smallest = descale[:, None, :, None] * 2**-10
    assert ((restored - x).abs() <= x.abs() / 16 + smallest).all()


@pytest.mark.parametrize("per_head", [True, False])
def test_by_norm(per_head: bool) -> None:
    """Query and key whose products, rounded too, are float16."""
    x = torch.randn(2, 5, 3, 128) * torch.tensor([1e-3, 1.0, 1e3])[None, None, :, None]
    x[1, :, 0] = 0  # a head without a scale
    x[0, 2, 1] = torch.eye(128)[7] * 1e4  # all of a row in one value
    scaled, descale = to_float8_by_norm(x, per_head)
    assert scaled.dtype == torch.float8_e4m3fn
    assert descale.shape == (2, 3)
    assert descale.dtype == torch.float32
    assert descale.is_contiguous()
    longest = x.norm(dim=-1).amax(dim=1).clamp(min=1e-12)
    torch.testing.assert_close(descale * LONGEST, longest if per_head else longest.amax().expand(2, 3))
    restored = scaled.float() * descale[:, None, :, None]
    assert ((restored - x).abs() <= x.abs() / 16 + descale[:, None, :, None] * 2**-10).all()
    assert torch.finfo(torch.float16).max > (17 / 16 * LONGEST) ** 2
    assert (scaled.float().norm(dim=-1) <= 17 / 16 * LONGEST).all()


@pytest.mark.parametrize("tokens", [1, 16, 37])
def test_tokens_innermost(tokens: int) -> None:
    x = torch.randn(2, tokens, 3, 8).to(torch.float8_e4m3fn)
    out = tokens_innermost(x)
    padded = -(-tokens // 16) * 16
    assert out.shape == (2, 3, 8, padded)
    assert out.is_contiguous()
    assert torch.equal(out.float()[..., :tokens], x.float().permute(0, 2, 3, 1))
    assert (out.float()[..., tokens:] == 0).all()
