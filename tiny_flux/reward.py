"""Reward fine-tuning: the model draws, the checker judges, the model learns from what came out right and what wrong.

Source: DiffusionNFT (arXiv 2509.16117, algorithm 1). Of several images for one prompt the better ones pull the model's
velocity towards themselves, the worse ones push it away, both seen from the velocity of the model that drew them. As
there, an image's pull is its reward beyond the mean of its prompt's images, errors are weighed as those of the
predicted image, divided by their size, and the model is held to what it was before this stage. Other than there, the
drawing model is the stage's moving average, and only prompts whose images differ in reward are learned from.

Both are needed: with nothing to hold it the model drifts off after some hundred steps, and with weaker pushes than
pulls it loses the guidance that was distilled into it (results/tiny-flux/reward-trials.json).
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
    # Before the stage, which may put half-trained weights into the model.
    first, old = (copy.deepcopy(velocity).eval().requires_grad_(False) for _ in range(2))
    steps, lr = settings.reward_steps, settings.reward_lr
    stage = Stage("reward", velocity, steps, lr, settings, work, device, ema=settings.reward_ema)
    old_of = dict(zip(velocity.parameters(), old.parameters(), strict=True))
    forward, first_forward, old_forward = (torch.compile(v) if settings.compile else v for v in (velocity, first, old))
    drawn: list[Round] = []

    with Judges(settings.reward_prompts * settings.reward_images) as judges:

        def loss(random: torch.Generator) -> dict[str, torch.Tensor]:
            if stage.step % settings.reward_updates == 0:  # as is the step of every checkpoint
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
                    before, at_first = (f(*given).velocity.float() for f in (old_forward, first_forward))
                now = forward(*given).velocity.float()
            error = preference_loss(now, before, at_first, noise - clean, t, good[rows], settings)
            return {"loss": error, "right": right}

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
    if settings.reward_categories:
        some = pool.of_categories(settings.reward_categories)
        half = torch.randint(len(some), (prompts // 2,), generator=random, device=device)
        index[: prompts // 2] = some[half]
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
    at_first: torch.Tensor,
    wanted: torch.Tensor,
    t: torch.Tensor,
    good: torch.Tensor,
    settings: Settings,
) -> torch.Tensor:
    """DiffusionNFT's loss (equation 5): the error of the model on good images, of its mirror image on bad ones.

    Velocities [n, 256, 64]: the model's, of the one that drew, of the one before the stage, and noise - image; noise
    levels t [n, 1, 1]; good [n] in 0..1.
    """

    def error(velocity: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """Of the predicted images x_t - t velocity, squared: [n]."""
        return (t * (velocity - other)).square().mean((1, 2))

    change = settings.reward_beta * (now - before)
    better, worse = error(before + change, wanted), error(before - change, wanted)
    size = (t * (before - wanted)).abs().mean((1, 2)).clamp(min=1e-5)
    return ((good * better + (1 - good) * worse + settings.reward_anchor * error(now, at_first)) / size).mean()
