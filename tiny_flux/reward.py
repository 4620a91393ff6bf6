"""Reward fine-tuning: the model draws, the checker judges, the model learns from what came out right and what wrong.

Source: DiffusionNFT (arXiv 2509.16117, algorithm 1). Of several images for one prompt the better ones pull the model's
velocity towards themselves, the worse ones push it away, both seen from the velocity of the model that drew them. As
there, an image's pull is its reward beyond the mean of its prompt's images, and errors are weighed as those of the
predicted image, each divided by its size. Other than there, the drawing model is the stage's moving average, only
prompts whose images differ in reward are learned from, and bad images push more weakly than good ones pull: at equal
strength nothing holds the model to any image, and here it drifted away after 250 steps.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import AutoencoderKL

from tiny_flux.checker import Verdict
from tiny_flux.data import Captions, Pool
from tiny_flux.drawing import Judges, decode, sample
from tiny_flux.flow import Predicted, Velocity, sample_time
from tiny_flux.settings import Settings
from tiny_flux.stage import Stage, autocast


class Round(NamedTuple):
    """Images as packed latents bfloat16 [n, 256, 64], their captions, and how good each is: float32 [n] in 0..1, 0.5
    for the mean of its prompt's images. right: how many of all that were drawn show all that was asked for."""

    images: torch.Tensor
    captions: Captions
    goodness: torch.Tensor
    right: torch.Tensor


def reward(verdict: Verdict) -> float:
    """Between 0 and 1: half for all claims together, half for each one's share."""
    return (verdict.right + sum(verdict.claims.values()) / len(verdict.claims)) / 2


def goodness(rewards: torch.Tensor) -> torch.Tensor:
    """0..1 of rewards [prompts, images] in 0..1: 0.5 for the mean of a prompt's images, so that they balance."""
    return 0.5 + 0.5 * (rewards - rewards.mean(1, keepdim=True))


def train_reward(
    velocity: Velocity, vae: AutoencoderKL, pool: Pool, settings: Settings, work: Path, device: torch.device
) -> None:
    if settings.reward_steps == 0:
        return
    steps, lr = settings.reward_steps, settings.reward_lr
    stage = Stage("reward", velocity, steps, lr, settings, work, device, ema=settings.reward_ema)
    old = copy.deepcopy(velocity).eval().requires_grad_(False)
    old_of = dict(zip(velocity.parameters(), old.parameters(), strict=True))
    forward, old_forward = (torch.compile(v) if settings.compile else v for v in (velocity, old))
    drawn: list[Round] = []

    with Judges(settings.reward_prompts * settings.reward_images) as judges:

        def loss(random: torch.Generator) -> dict[str, torch.Tensor]:
            if stage.step % settings.reward_updates == 0 or not drawn:
                for parameter, average in zip(stage.parameters, stage.ema, strict=True):
                    old_of[parameter].copy_(average)
                drawn[:] = [draw(old_forward, vae, pool, settings, judges, random)]
            images, captions, good, right = drawn[0]
            rows = torch.randint(len(images), (settings.reward_batch,), generator=random, device=device)
            clean, own = images[rows].float(), captions.at(rows)
            noise = torch.randn(clean.shape, generator=random, device=device)
            time = sample_time(len(rows), settings.time_shift, random, device)
            t = time[:, None, None]
            given = ((1 - t) * clean + t * noise, time, own.t5_ids, own.clip_ids)
            with autocast(device):
                with torch.no_grad():
                    before = old_forward(*given).velocity.float()
                now = forward(*given).velocity.float()
            return {"loss": preference_loss(now, before, noise - clean, t, good[rows], settings), "right": right}

        stage.run(loss)


def draw(
    forward: Callable[..., Predicted],
    vae: AutoencoderKL,
    pool: Pool,
    settings: Settings,
    judges: Judges,
    random: torch.Generator,
) -> Round:
    """Several images for each of some of the pool's captions, judged; those of prompts whose rewards differ."""
    device, prompts, each = random.device, settings.reward_prompts, settings.reward_images
    index = torch.randint(len(pool), (prompts,), generator=random, device=device)
    captions = pool.captions(index, random).at(torch.arange(prompts, device=device).repeat_interleave(each))
    index = index.repeat_interleave(each)
    choice = int(torch.randint(len(settings.reward_sampling_steps), (), generator=random, device=device))
    images = torch.empty(len(index), 256, 64, dtype=torch.bfloat16, device=device)
    for rows in torch.arange(len(index), device=device).split(settings.flow_batch):
        noise = torch.randn(len(rows), 256, 64, generator=random, device=device)
        images[rows] = sample(forward, noise, captions.at(rows), settings.reward_sampling_steps[choice], device).to(
            images.dtype
        )
        judges.give(decode(vae, images[rows]), [pool.descriptions[i] for i in index[rows].tolist()])
    verdicts = judges.verdicts()
    rewards = torch.tensor([reward(v) for v in verdicts], device=device).view(prompts, each)
    differ = rewards.amax(1) > rewards.amin(1)
    if not differ.any():  # nothing to prefer; all processes make their steps all the same
        differ[:] = True
    kept = differ.repeat_interleave(each)
    right = torch.tensor(sum(v.right for v in verdicts) / len(verdicts), device=device)
    return Round(images[kept], captions.at(kept), goodness(rewards[differ]).flatten(), right)


def preference_loss(
    now: torch.Tensor,
    before: torch.Tensor,
    wanted: torch.Tensor,
    t: torch.Tensor,
    good: torch.Tensor,
    settings: Settings,
) -> torch.Tensor:
    """DiffusionNFT's loss (equation 5): the model's velocity `now` on good images, its mirror image on bad ones.

    now, before and wanted [n, 256, 64]: the velocities of the model, of the one that drew, and noise - image; noise
    levels t [n, 1, 1]; good [n] in 0..1.
    """
    change = settings.reward_beta * (now - before)
    better, worse = (_error(before + sign * change, wanted, t) for sign in (1, -1))
    return (good * better + settings.reward_push * (1 - good) * worse).mean()


def _error(velocity: torch.Tensor, wanted: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Of each predicted image (x_t - t velocity), squared, over its mean absolute error: [n] from [n, 256, 64]."""
    error = t * (velocity - wanted)
    return error.square().mean((1, 2)) / error.detach().abs().mean((1, 2)).clamp(min=1e-5)
