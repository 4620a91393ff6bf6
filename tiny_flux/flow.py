"""Rectified flow (arXiv 2209.03003, 2403.03206) of transformer and text encoders."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers import FluxPipeline
from torch import nn

from tiny_flux.claims import ClaimsHead
from tiny_flux.data import Captions, Pool
from tiny_flux.layout import LayoutHead
from tiny_flux.settings import Settings
from tiny_flux.stage import Stage, autocast


class Predicted(NamedTuple):
    """velocity [n, 256, 64], and for the heads: the image tokens' states in the middle of the transformer
    [n, 256, features], T5's states [n, 64, features] and CLIP's pooled state [n, features]."""

    velocity: torch.Tensor
    image: torch.Tensor
    text: torch.Tensor
    pooled: torch.Tensor


class Velocity(nn.Module):
    """Text encoders and transformer as one function: (latents, t, token ids) -> predicted noise - x_0."""

    def __init__(self, pipe: FluxPipeline, seed: int):
        """seed: of the heads, which the pipeline doesn't hold."""
        super().__init__()
        self.transformer, self.clip, self.t5 = pipe.transformer, pipe.text_encoder, pipe.text_encoder_2
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.layout_head = LayoutHead(pipe.transformer.inner_dim)
            self.t5_head = ClaimsHead(self.t5.config.d_model)
            self.clip_head = ClaimsHead(self.clip.config.hidden_size)
        self.register_buffer("image_ids", pipe._prepare_latent_image_ids(1, 16, 16, "cpu", torch.float32), False)
        self._hidden: list[torch.Tensor] = []
        singles = pipe.transformer.single_transformer_blocks
        singles[len(singles) // 2 - 1].register_forward_hook(self._keep)

    def _keep(self, block: nn.Module, given: tuple, out: tuple[torch.Tensor, torch.Tensor]) -> None:
        self._hidden.append(out[1])

    def forward(
        self, latents: torch.Tensor, time: torch.Tensor, t5_ids: torch.Tensor, clip_ids: torch.Tensor
    ) -> Predicted:
        """latents [n, 256, 64], time [n] in 0..1, token ids [n, 64] and [n, 77]."""
        states, pooled = self.t5(t5_ids)[0], self.clip(clip_ids).pooler_output
        velocity = self.transformer(
            hidden_states=latents,
            timestep=time,
            pooled_projections=pooled,
            encoder_hidden_states=states,
            txt_ids=states.new_zeros(states.shape[1], 3),
            img_ids=self.image_ids,
            return_dict=False,
        )[0]
        return Predicted(velocity, self._hidden.pop(), states, pooled)

    def matrices(self) -> list[nn.Parameter]:
        """The projections of the transformer's blocks, without their modulation."""
        transformer = self.transformer
        blocks = (*transformer.transformer_blocks, *transformer.single_transformer_blocks)
        named = (item for block in blocks for item in block.named_parameters())
        return [p for name, p in named if p.ndim == 2 and "norm" not in name]


def sample_time(count: int, shift: float, random: torch.Generator, device: torch.device) -> torch.Tensor:
    """Noise levels in 0..1: logit-normal, one in five uniform so that the ends are seen, then shifted."""
    normal = torch.sigmoid(torch.randn(count, generator=random, device=device))
    uniform = torch.rand(count, generator=random, device=device)
    return shifted(torch.where(torch.rand(count, generator=random, device=device) < 0.2, uniform, normal), shift)


def shifted(time: torch.Tensor, shift: float) -> torch.Tensor:
    """FlowMatchEulerDiscreteScheduler's static shift (Stable Diffusion 3, arXiv 2403.03206, section 5.3.2)."""
    return shift * time / (1 + (shift - 1) * time)


def draw_noisy(
    latents: torch.Tensor, settings: Settings, random: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A batch of the pool's latents: their index [b], themselves and noise for them [b, 256, 64], noise levels [b]."""
    device = latents.device
    index = torch.randint(len(latents), (settings.flow_batch,), generator=random, device=device)
    clean = latents[index].float()
    noise = torch.randn(clean.shape, generator=random, device=device)
    return index, clean, noise, sample_time(len(index), settings.time_shift, random, device)


def train_flow(
    pipe: FluxPipeline, pool: Pool, latents: torch.Tensor, settings: Settings, work: Path, device: torch.device
) -> Velocity:
    velocity = Velocity(pipe, settings.seed).to(device)
    matrices = velocity.matrices() if settings.muon else []
    stage = Stage("flow", velocity, settings.flow_steps, settings.flow_lr, settings, work, device, matrices)
    forward = torch.compile(velocity) if settings.compile else velocity

    def loss(random: torch.Generator) -> dict[str, torch.Tensor]:
        index, clean, noise, time = draw_noisy(latents, settings, random)
        captions = pool.captions(index, random, settings.empty_captions)
        error, predicted = flow_loss(forward, clean, noise, time, captions, device)
        with autocast(device):
            layout = velocity.layout_head.loss(predicted.image, pool.layout(index))
            claims = velocity.t5_head.loss(predicted.text, captions.claims)
            claims = claims + velocity.clip_head.loss(predicted.pooled[:, None], captions.claims)
        total = error + settings.layout_weight * layout + settings.claims_weight * claims
        return {"loss": total, "velocity": error, "layout": layout, "claims": claims}

    stage.run(loss)
    return velocity


def flow_loss(
    forward: Callable[..., Predicted],
    clean: torch.Tensor,
    noise: torch.Tensor,
    time: torch.Tensor,
    captions: Captions,
    device: torch.device,
) -> tuple[torch.Tensor, Predicted]:
    """Mean squared error of the predicted velocity at x_t = (1 - t) x_0 + t noise; and all that was predicted."""
    t = time[:, None, None]
    with autocast(device):
        predicted = forward((1 - t) * clean + t * noise, time, captions.t5_ids, captions.clip_ids)
    return F.mse_loss(predicted.velocity.float(), noise - clean), predicted
