"""Guidance distillation: the model learns to give in one evaluation what classifier-free guidance takes two for.

What it learns from is also told what a caption leaves open and the scene keeps to (`tiny_flux.data.told_where`), so
that the model comes to see to it by itself. With a guidance of 1, that is all that is distilled.

Source: Meng et al., arXiv 2210.03142, section 3.1, for one fixed guidance; guidance itself is arXiv 2207.12598.
"""

from __future__ import annotations

import copy
from pathlib import Path

import torch
import torch.nn.functional as F

from tiny_flux.data import Pool
from tiny_flux.flow import Velocity, draw_noisy
from tiny_flux.settings import Settings
from tiny_flux.stage import Stage, autocast


def distil_guidance(
    velocity: Velocity, pool: Pool, latents: torch.Tensor, settings: Settings, work: Path, device: torch.device
) -> None:
    """Train `velocity` on the guided predictions of what it was, on noisy latents of the pool, [n, 256, 64]."""
    teacher = copy.deepcopy(velocity).eval().requires_grad_(False)
    stage = Stage("guidance", velocity, settings.guidance_steps, settings.guidance_lr, settings, work, device)
    student_forward, teacher_forward = (torch.compile(v) if settings.compile else v for v in (velocity, teacher))

    def loss(random: torch.Generator) -> dict[str, torch.Tensor]:
        index, clean, noise, time = draw_noisy(latents, settings, random)
        t = time[:, None, None]
        noisy = (1 - t) * clean + t * noise
        (captions, told), nothing = pool.captions_and_told(index, random), pool.empty(len(index))
        with autocast(device):
            with torch.no_grad():
                wanted = teacher_forward(noisy, time, told.t5_ids, told.clip_ids).velocity.float()
                free = teacher_forward(noisy, time, nothing.t5_ids, nothing.clip_ids).velocity.float()
            predicted = student_forward(noisy, time, captions.t5_ids, captions.clip_ids).velocity
        return {"loss": F.mse_loss(predicted.float(), free + settings.guidance * (wanted - free))}

    stage.run(loss)
