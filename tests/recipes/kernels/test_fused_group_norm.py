"""The VAE's decoder with fused GroupNorms against diffusers' own, on the embedded model."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
from diffusers.models.resnet import ResnetBlock2D
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
    blocks = {
        name: part for name, part in fused.named_modules() if isinstance(part, ResnetBlock2D) and "decoder" in name
    }
    for vae in (plain, fused):
        vae.to(memory_format=torch.channels_last)
    assert fuse(fused) == len(norms) - 1, "the attention's stays"
    moved = {f"{name}.conv1.bias": f"{name}.norm2.added" for name, block in blocks.items()}
    assert set(fused.state_dict()) == {moved.get(name, name) for name in names}
    latents = torch.randn(2, 16, 6, 4, generator=torch.Generator().manual_seed(0)).to(device)
    expected = exact.decode(latents).sample
    error = error_of(fused.decode(latents.to(dtype)).sample.float(), expected)
    before = error_of(plain.decode(latents.to(dtype)).sample.float(), expected)
    assert error < max(1.1 * before, 1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("more", [{}, {"execution": "compile"}, {"execution": "compile", "cuda_graph": True}])
def test_applied_and_compiled(tiny: Callable, draw: Callable, device: torch.device, more: dict) -> None:
    recipe = Recipe(dtype="bfloat16", channels_last=True, fused_group_norm=True, **more)
    pipe, plain = (tiny(torch.bfloat16, device) for _ in range(2))
    recipes.apply(pipe, recipe)
    assert sum(isinstance(module, GroupNormSiLU) for module in pipe.vae.modules()) > 10
    assert abs(draw(pipe, steps=2) - draw(plain, steps=2)).mean() < 0.01
