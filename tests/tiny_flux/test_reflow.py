"""Reflow keeps the pairs whose images the checker finds right."""

from __future__ import annotations

import random
from dataclasses import replace

import torch
from diffusers import AutoencoderKL, FluxPipeline

from tiny_flux import scenes
from tiny_flux.data import training_description
from tiny_flux.reflow import right_ones
from utils.files import ROOT


def test_right_ones_are_those_that_show_their_description() -> None:
    rng = random.Random(0)
    shown = [replace(training_description(rng), background="white") for _ in range(6)]
    vae = AutoencoderKL.from_pretrained(ROOT / "assets" / "tiny-flux" / "vae", dtype=torch.float32)
    images = scenes.render([scenes.realize(description, rng) for description in shown]) * 2 - 1
    with torch.no_grad():
        latents = (vae.encode(images).latent_dist.mean - vae.config.shift_factor) * vae.config.scaling_factor
    packed = FluxPipeline._pack_latents(latents, 6, 16, 32, 32)
    claimed = [d if i % 2 else replace(d, background="black") for i, d in enumerate(shown)]
    assert right_ones(vae, packed, claimed).tolist() == [False, True] * 3
