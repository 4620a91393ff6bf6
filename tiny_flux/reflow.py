"""Reflow: rectified flow on pairs of noise and what the model makes of it."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL
from tqdm import tqdm

from tiny_flux import ranks
from tiny_flux.data import Pool
from tiny_flux.drawing import Judges, decode, sample
from tiny_flux.flow import Velocity, flow_loss, shifted
from tiny_flux.model import SHIFT
from tiny_flux.scenes import Description
from tiny_flux.settings import Settings
from tiny_flux.stage import Stage, generator, save_atomically
from utils.errors import UserError

_TOGETHER = 2048  # images that are judged before more are decoded


@torch.no_grad()
def make_pairs(
    velocity: Velocity, vae: AutoencoderKL, pool: Pool, settings: Settings, work: Path, device: torch.device
) -> dict[str, torch.Tensor]:
    """What the model makes of noise: {"noise", "image"} bfloat16 [n, 256, 64] and "index" into the pool [n]."""
    path = ranks.own_folder(work) / "pairs.pt"
    if path.exists():
        return torch.load(path, map_location=device, weights_only=True)
    count = settings.reflow_pairs
    noise = torch.empty(count, 256, 64, dtype=torch.bfloat16, device=device)
    image = torch.empty_like(noise)
    which = torch.empty(count, dtype=torch.long, device=device)
    forward = torch.compile(velocity) if settings.compile else velocity
    batches = torch.arange(count, device=device).split(settings.flow_batch)
    for number, rows in enumerate(tqdm(batches, desc="pairs", mininterval=2)):
        random = generator(device, ranks.own_seed(settings.seed), "pairs", number)
        index = torch.randint(len(pool), rows.shape, generator=random, device=device)
        noise[rows] = torch.randn(len(rows), 256, 64, generator=random, device=device).to(noise.dtype)
        which[rows] = index
        captions = pool.captions(index, random)
        image[rows] = sample(forward, noise[rows], captions, settings.reflow_sampling_steps, device).to(image.dtype)
    pairs = {"noise": noise, "image": image, "index": which}
    if settings.only_right:
        kept = right_ones(vae, image, [pool.descriptions[i] for i in which.tolist()])
        print(f"{kept.sum()} of {count} pairs are right", flush=True)
        if not kept.any():
            raise UserError("not one of the model's images is right: train `flow` for longer (--flow-steps)")
        pairs = {name: tensor[kept.to(device)] for name, tensor in pairs.items()}
    save_atomically(pairs, path)
    return pairs


def right_ones(vae: AutoencoderKL, latents: torch.Tensor, descriptions: list[Description]) -> torch.Tensor:
    """Whether the images of packed latents [n, 256, 64] show all that is described: bool [n]."""
    right: list[bool] = []
    with Judges(_TOGETHER) as judges:
        for start in tqdm(range(0, len(latents), _TOGETHER), desc="check", mininterval=2):
            for part in latents[start : start + _TOGETHER].split(256):
                judges.give(decode(vae, part), descriptions[start : start + len(part)])
                start += len(part)
            right += [verdict.right for verdict in judges.verdicts()]
    return torch.tensor(right)


def train_reflow(
    velocity: Velocity, vae: AutoencoderKL, pool: Pool, settings: Settings, work: Path, device: torch.device
) -> None:
    if settings.reflow_steps == 0:
        return
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
