"""The update by which FLUX.1's pipelines go from one step to the next: diffusers' FlowMatchEulerDiscreteScheduler's."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler


def euler(latents: torch.Tensor, velocity: torch.Tensor, sigma: torch.Tensor, next_sigma: torch.Tensor) -> torch.Tensor:
    """The next latents, in the velocity's dtype, rounded where FlowMatchEulerDiscreteScheduler.step rounds.

    latents, velocity [batch, tokens, channels]; the sigmas are float32 tensors without dimensions.
    """
    return (latents.float() + (next_sigma - sigma) * velocity).to(velocity.dtype)


def is_plain_euler(scheduler: Any, *mixins: type) -> bool:
    """Whether `euler` is what a scheduler's step does, `mixins` of its class left aside."""
    kinds = [kind for kind in type(scheduler).__mro__ if kind not in mixins and "step" in vars(kind)]
    plain = bool(kinds) and vars(kinds[0])["step"] is FlowMatchEulerDiscreteScheduler.step
    return plain and not scheduler.config.get("stochastic_sampling")
