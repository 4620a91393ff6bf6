"""Reflow: rectified flow on pairs of noise and what the model makes of it."""

from __future__ import annotations

import itertools
import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, FluxPipeline
from tqdm import tqdm

from tiny_flux import ranks
from tiny_flux.checker import check
from tiny_flux.data import Pool
from tiny_flux.flow import Velocity, flow_loss, shifted
from tiny_flux.model import SHIFT
from tiny_flux.scenes import IMAGE_SIZE, Description
from tiny_flux.settings import Settings
from tiny_flux.stage import Stage, autocast, generator, save_atomically
from utils.errors import UserError


@torch.no_grad()
def make_pairs(
    velocity: Velocity, vae: AutoencoderKL, pool: Pool, settings: Settings, work: Path, device: torch.device
) -> dict[str, torch.Tensor]:
    """What the model makes of noise: {"noise", "image"} bfloat16 [n, 256, 64] and "index" into the pool [n]."""
    path = ranks.own_folder(work) / "pairs.pt"
    if path.exists():
        return torch.load(path, map_location=device, weights_only=True)
    count, steps = settings.reflow_pairs, settings.reflow_sampling_steps
    noise = torch.empty(count, 256, 64, dtype=torch.bfloat16, device=device)
    image = torch.empty_like(noise)
    which = torch.empty(count, dtype=torch.long, device=device)
    forward = torch.compile(velocity) if settings.compile else velocity
    batches = torch.arange(count, device=device).split(settings.flow_batch)
    for number, rows in enumerate(tqdm(batches, desc="pairs", mininterval=2)):
        random = generator(device, ranks.own_seed(settings.seed), "pairs", number)
        index = torch.randint(len(pool), rows.shape, generator=random, device=device)
        noise[rows] = torch.randn(len(rows), 256, 64, generator=random, device=device).to(noise.dtype)
        x, which[rows] = noise[rows].float(), index
        captions = pool.captions(index, random)
        for now, then in itertools.pairwise(shifted(torch.linspace(1, 0, steps + 1, device=device), SHIFT)):
            with autocast(device):
                predicted = forward(x, now.expand(len(rows)), captions.t5_ids, captions.clip_ids).velocity
            x = x - predicted.float() * (now - then)
        image[rows] = x.to(image.dtype)
    pairs = {"noise": noise, "image": image, "index": which}
    if settings.only_right:
        kept = right_ones(vae, image, [pool.descriptions[i] for i in which.tolist()])
        print(f"{kept.sum()} of {count} pairs are right", flush=True)
        if not kept.any():
            raise UserError("not one of the model's images is right: train `flow` for longer (--flow-steps)")
        pairs = {name: tensor[kept.to(device)] for name, tensor in pairs.items()}
    save_atomically(pairs, path)
    return pairs


@torch.no_grad()
def right_ones(vae: AutoencoderKL, latents: torch.Tensor, descriptions: list[Description]) -> torch.Tensor:
    """Whether the images of packed latents [n, 256, 64] show all that is described: bool [n]."""
    right: list[bool] = []
    processes = max(1, (os.cpu_count() or 1) // ranks.count())
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as checkers:
        for start in tqdm(range(0, len(latents), 256), desc="check", mininterval=2):
            x = FluxPipeline._unpack_latents(latents[start : start + 256].float(), IMAGE_SIZE, IMAGE_SIZE, 8)
            with autocast(latents.device):
                images = vae.decode(x / vae.config.scaling_factor + vae.config.shift_factor).sample
            pixels = ((images.float() / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
            right += checkers.map(_is_right, pixels, descriptions[start : start + 256], chunksize=16)
    return torch.tensor(right)


def _is_right(image: np.ndarray, description: Description) -> bool:
    return check(image, description).right


def train_reflow(
    velocity: Velocity, vae: AutoencoderKL, pool: Pool, settings: Settings, work: Path, device: torch.device
) -> None:
    pairs = make_pairs(velocity, vae, pool, settings, work, device)
    stage = Stage("reflow", velocity, settings.reflow_steps, settings.reflow_lr, settings, work, device)
    forward = torch.compile(velocity) if settings.compile else velocity

    def loss(random: torch.Generator) -> dict[str, torch.Tensor]:
        rows = torch.randint(len(pairs["index"]), (settings.flow_batch,), generator=random, device=device)
        time = shifted(torch.rand(len(rows), generator=random, device=device), SHIFT)
        captions = pool.captions(pairs["index"][rows], random)
        clean, noise = pairs["image"][rows].float(), pairs["noise"][rows].float()
        return {"loss": flow_loss(forward, clean, noise, time, captions, device)[0]}

    stage.run(loss)
