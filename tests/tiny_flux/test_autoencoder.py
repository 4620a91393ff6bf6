"""The pool's latents, and the autoencoder's factors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline

from tiny_flux.autoencoder import encode_pool
from tiny_flux.data import make_pool
from tiny_flux.settings import Settings
from utils.files import ROOT


@pytest.fixture
def pipe() -> FluxPipeline:
    return FluxPipeline.from_pretrained(ROOT / "assets" / "tiny-flux", dtype=torch.float32)


@pytest.mark.parametrize("trained_here", [False, True])
def test_only_an_autoencoder_trained_in_this_run_gets_new_factors(
    pipe: FluxPipeline, tmp_path: Path, trained_here: bool
) -> None:
    before = pipe.vae.config.scaling_factor, pipe.vae.config.shift_factor
    pool = make_pool(4, 1, 0, pipe.tokenizer, pipe.tokenizer_2)
    settings = Settings(vae_steps=int(trained_here))
    latents = encode_pool(pipe, pool, settings, tmp_path, torch.device("cpu")).float()
    after = pipe.vae.config.scaling_factor, pipe.vae.config.shift_factor
    assert latents.shape == (4, 256, 64)
    if trained_here:
        assert latents.mean().item() == pytest.approx(0, abs=0.01)
        assert latents.std().item() == pytest.approx(1, abs=0.01)
    else:
        assert after == before
    again = encode_pool(pipe, pool, settings, tmp_path, torch.device("cpu"))  # from what it kept
    assert torch.equal(again.float(), latents)
