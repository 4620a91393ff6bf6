"""The pool's latents, and the autoencoder's factors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline

from tiny_flux.autoencoder import encode_pool, train_decoder
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


def test_the_decoders_stage_leaves_the_latents_alone(pipe: FluxPipeline, tmp_path: Path) -> None:
    before = {name: tensor.clone() for name, tensor in pipe.vae.state_dict().items()}
    pool = make_pool(8, 1, 0, pipe.tokenizer, pipe.tokenizer_2)
    settings = Settings(decoder_steps=1, vae_batch=2, compile=0)
    train_decoder(pipe.vae, pool, settings, tmp_path, torch.device("cpu"))
    changed = {name.split(".")[0] for name, old in before.items() if not torch.equal(old, pipe.vae.state_dict()[name])}
    assert changed == {"decoder"}


def test_scenes_with_a_small_object(pipe: FluxPipeline) -> None:
    pool = make_pool(200, 1, 0, pipe.tokenizer, pipe.tokenizer_2)
    small = set(pool.with_radius_below(24).tolist())
    for i, description in enumerate(pool.descriptions):
        assert (i in small) == any(described.size == "small" for described in description.objects)
    assert 0 < len(small) < 200
    assert len(pool.with_radius_below(1)) == 200, "none: all of them"
