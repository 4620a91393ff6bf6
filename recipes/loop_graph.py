"""The whole denoising loop as one call of the transformer, and so one CUDA graph: a single launch for all steps.

Prompts, noise, timesteps and decoding stay diffusers' own. Its pipeline sees a schedule of one step; there, the
transformer's forward runs all of them, with the scheduler's update after each. What is hoisted comes for all steps at
once. A graph is one of so many steps of such shapes; prompt, noise, timesteps, sigmas and guidance are its inputs.

What needs the host between two steps can't be had, and is refused: callbacks, interruption, true classifier-free
guidance. So it is for those who ask for it, and no rung after its own inherits it.

Source: FluxPipeline.__call__, FluxKontextPipeline.__call__ and FlowMatchEulerDiscreteScheduler.step of diffusers.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import (
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxKontextPipeline,
    FluxPipeline,
    SchedulerMixin,
)

from recipes.euler import euler, is_plain_euler
from recipes.hoisting import by_name
from recipes.optimization import Needs, Optimization
from recipes.recipe import Recipe, StepSkipping
from recipes.step_cache import Velocities, computed
from utils.errors import UsageError
from utils.mixin import mix_in
from utils.ranges import DENOISING_LOOP

_WARM_UP_STEPS = 2  # that are computed: the second one's latents come from the first
_INSTEAD = "use a recipe with loop_graph=false"


class OneStep(SchedulerMixin):
    """Mixin for a scheduler: in a `LoopPipeline`'s call, the loop is one step, and its result the latents.

    steps: all timesteps of the call, [steps] float32 in 0..1000.
    """

    in_call = False
    steps: torch.Tensor
    timesteps: torch.Tensor

    @functools.wraps(FlowMatchEulerDiscreteScheduler.set_timesteps)  # the pipeline looks at its signature
    def set_timesteps(self, *args: Any, **kwargs: Any) -> None:
        super().set_timesteps(*args, **kwargs)
        if self.in_call:
            self.steps, self.timesteps = self.timesteps, self.timesteps[:1]

    def step(self, model_output: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return (model_output,) if self.in_call else super().step(model_output, *args, **kwargs)


class LoopPipeline(DiffusionPipeline):
    """Mixin for FluxPipeline and FluxKontextPipeline: called as these are, calls its transformer once, and its progress
    bar counts one step.

    Raises:
        UsageError: at a call that needs the host between two steps, or whose scheduler isn't diffusers'
            FlowMatchEulerDiscreteScheduler, there when the recipe was applied.
    """

    denoising_range = DENOISING_LOOP  # utils.ranges
    latent_tokens = 0  # of the call; Kontext's transformer gets those of the image to edit after them

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        _check(self, inspect.signature(super().__call__).bind(*args, **kwargs).arguments)
        self.scheduler.in_call = True
        try:
            return super().__call__(*args, **kwargs)
        finally:
            self.scheduler.in_call = False

    def prepare_latents(self, *args: Any, **kwargs: Any) -> Any:
        latents, *others = super().prepare_latents(*args, **kwargs)
        self.latent_tokens = latents.shape[1]
        return latents, *others

    @property
    def _interrupt(self) -> bool:
        return False

    @_interrupt.setter
    def _interrupt(self, value: bool) -> None:  # diffusers sets False at each call, a user True
        if value:
            raise UsageError(f"a denoising loop of one launch can't be interrupted: {_INSTEAD}")


def _check(pipe: LoopPipeline, given: dict[str, Any]) -> None:
    """Raise UsageError unless `pipe` can be called with these arguments."""
    if not isinstance(pipe, (FluxPipeline, FluxKontextPipeline)):
        reason = f"is for FluxPipeline and FluxKontextPipeline, not {type(pipe).__name__}:"
    elif not isinstance(pipe.scheduler, OneStep) or not is_plain_euler(pipe.scheduler, OneStep):
        reason = "needs the FlowMatchEulerDiscreteScheduler it was applied to, without stochastic_sampling: keep it, or"
    elif given.get("callback_on_step_end") is not None:
        reason = "takes no callback_on_step_end: leave it out, or"
    elif given.get("true_cfg_scale", 1.0) > 1:
        reason = "takes no true_cfg_scale above 1: leave it out, or"
    else:
        return
    raise UsageError(f"a denoising loop of one launch {reason} {_INSTEAD}")


class DenoisingLoop:
    """Stands in for `step`, the transformer's forward: runs all steps if it is given sigmas, and else one.

    speed_factor: one of so many is computed, the others are extrapolated (recipes/step_cache.py).
    """

    def __init__(self, step: Callable, speed_factor: float = 1.0):
        self.function, self.speed_factor = step, speed_factor

    def __call__(
        self, *args: Any, sigmas: torch.Tensor | None = None, latent_tokens: int = 0, **named: Any
    ) -> tuple[torch.Tensor] | Any:
        """All steps: (latents after the last, [batch, latent_tokens, channels]).

        sigmas [steps + 1] float32. hidden_states [batch, tokens, channels]: the noise, `latent_tokens` of them, and
        what every step sees after it. Of all steps either timestep [steps, batch], in 0..1, or hoisted, modulation
        [steps, batch, width]. The rest as the step takes it, the same at each.
        """
        if sigmas is None:
            return self.function(*args, **named)
        return self._steps(computed(len(sigmas) - 1, self.speed_factor), sigmas, latent_tokens, **named)

    def warm_up(
        self, *args: Any, sigmas: torch.Tensor | None = None, latent_tokens: int = 0, **named: Any
    ) -> tuple[torch.Tensor] | Any:
        """Fewer steps, in which all is compiled, tuned and loaded that the others need."""
        if sigmas is None:
            return self.function(*args, **named)
        skips = not all(computed(len(sigmas) - 1, self.speed_factor))
        are_computed = [*[True] * _WARM_UP_STEPS, *[False] * skips]
        return self._steps(are_computed[: len(sigmas) - 1], sigmas, latent_tokens, **named)

    def _steps(
        self, are_computed: Sequence[bool], sigmas: torch.Tensor, latent_tokens: int, **named: Any
    ) -> tuple[torch.Tensor]:
        """The first steps, as many as are told of whether they are computed."""
        latents, image = named.pop("hidden_states").tensor_split([latent_tokens], dim=1)
        of_steps = {name: named.pop(name) for name in ("timestep", "modulation") if name in named}
        velocities = Velocities()
        for i, is_computed in enumerate(are_computed):
            if is_computed:
                tokens = torch.cat([latents, image], dim=1) if image.shape[1] else latents
                # Copied, so that they are aligned like tensors of their own, for which a step is compiled.
                of_step = {name: every[i].clone() for name, every in of_steps.items()}
                velocity = self.function(hidden_states=tokens, **of_step, **named)[0][:, :latent_tokens]
                velocities.add(sigmas[i], velocity)
            else:
                velocity = velocities.extrapolated(sigmas[i])
            latents = euler(latents, velocity, sigmas[i], sigmas[i + 1])
        return (latents,)


def _apply(pipe: DiffusionPipeline, recipe: Recipe) -> str:
    def give_all_steps(module: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        scheduler = pipe.scheduler
        if not scheduler.in_call:  # called by hand
            return args, kwargs
        named = by_name(args, kwargs)
        timestep = named["timestep"]  # of the first step
        steps = scheduler.steps.to(timestep.dtype) / 1000  # rounded as the pipeline rounds it
        every = {"timestep": steps[:, None].expand(-1, len(timestep)), "sigmas": scheduler.sigmas}
        return (), {**named, **every, "latent_tokens": pipe.latent_tokens}

    speed_factor = recipe.cache.speed_factor if isinstance(recipe.cache, StepSkipping) else 1.0
    pipe.transformer.forward = DenoisingLoop(pipe.transformer.forward, speed_factor)
    # Before what is hoisted, which then is for all steps.
    pipe.transformer.register_forward_pre_hook(give_all_steps, prepend=True, with_kwargs=True)
    mix_in(pipe, LoopPipeline)
    mix_in(pipe.scheduler, OneStep)
    return "all steps in one call of the transformer"


OPTIMIZATION = Optimization(
    field="loop_graph",
    needs=lambda recipe: Needs(),
    lossless=lambda recipe: True,
    apply=_apply,
    replaces_forward=lambda recipe: True,
)
