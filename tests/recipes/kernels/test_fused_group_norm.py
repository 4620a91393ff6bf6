"""The VAE's decoder with fused GroupNorms against diffusers' own, on the embedded model."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable

import pytest
import torch
from torch import nn

pytest.importorskip("triton", reason="needs the package triton, which isn't installed")

import recipes
from recipes import Recipe
from recipes.fused_group_norm import GroupNormSiLU, fuse

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = [] if INTERPRETED else [pytest.mark.gpu]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_decodes_as_before(tiny: Callable, device: torch.device, error_of: Callable, dtype: torch.dtype) -> None:
    exact, plain, fused = (tiny(kind, device).vae for kind in (torch.float32, dtype, dtype))
    names = set(fused.state_dict())
    norms = [module for module in fused.decoder.modules() if isinstance(module, nn.GroupNorm)]
    for vae in (plain, fused):
        vae.to(memory_format=torch.channels_last)
    assert fuse(fused) == len(norms) - 1, "the attention's stays"
    assert set(fused.state_dict()) == names
    latents = torch.randn(2, 16, 6, 4, generator=torch.Generator().manual_seed(0)).to(device)
    expected = exact.decode(latents).sample
    decoded = fused.decode(latents.to(dtype)).sample.float()
    error = error_of(decoded, expected)
    before = error_of(plain.decode(latents.to(dtype)).sample.float(), expected)
    assert error < max(1.1 * before, 1e-5)
    copied = copy.deepcopy(fused)
    for block in copied.decoder.up_blocks[0].resnets:
        block.conv1.bias.data += torch.randn_like(block.conv1.bias)
    assert torch.equal(fused.decode(latents.to(dtype)).sample.float(), decoded), "the copy has biases of its own"
    assert error_of(copied.decode(latents.to(dtype)).sample.float(), decoded) > 1e-3


@pytest.mark.gpu
@pytest.mark.parametrize("more", [{}, {"execution": "compile"}, {"execution": "compile", "cuda_graph": True}])
def test_applied_and_compiled(tiny: Callable, draw: Callable, device: torch.device, more: dict) -> None:
    recipe = Recipe(dtype="bfloat16", channels_last=True, fused_group_norm=True, **more)
    pipe, plain = (tiny(torch.bfloat16, device) for _ in range(2))
    recipes.apply(pipe, recipe)
    assert sum(isinstance(module, GroupNormSiLU) for module in pipe.vae.modules()) > 10
    assert abs(draw(pipe, steps=2) - draw(plain, steps=2)).mean() < 0.01
