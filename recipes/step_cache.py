"""Step caching: what a denoising step would compute is taken from the steps before. Lossy, in two ways.

`FirstBlockCache` skips most of a step whose first block changes little, which it decides from data at each step: that
can't be captured, compiled or put into a package.

`StepSkipping` decides nothing from data. Which steps are computed follows from how many there are; in the others the
transformer isn't called, and its velocity lies on the line through the last two computed ones. So every recipe takes
it: packages, CUDA graphs, and all steps in one launch (recipes/loop_graph.py).

Both lie outside the ladder, whose rungs compute every step.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import DiffusionPipeline, FirstBlockCacheConfig
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import nn

from recipes.euler import is_plain_euler
from recipes.optimization import Needs, Optimization
from recipes.recipe import FirstBlockCache, Recipe
from utils.errors import UsageError
from utils.mixin import mix_in


def computed(steps: int, speed_factor: float) -> list[bool]:
    """Which of a call's steps are computed: one of `speed_factor`, evenly, the first among them, and the last if there
    are two."""
    count = max(1, round(steps / speed_factor))
    places = {(2 * i * (steps - 1) + count - 1) // (2 * (count - 1)) for i in range(count)} if count > 1 else {0}
    return [step in places for step in range(steps)]


class Velocities:
    """The last two velocities that were computed, and the line through them.

    Source: the two-step Adams-Bashforth method, which integrates along that line.
    """

    def __init__(self) -> None:
        self._known: deque[tuple[torch.Tensor, torch.Tensor]] = deque(maxlen=2)

    def add(self, sigma: torch.Tensor, velocity: torch.Tensor) -> None:
        """Keep a computed `velocity` [batch, tokens, channels] at `sigma`, float32 without dimensions."""
        self._known.append((sigma, velocity))

    def extrapolated(self, sigma: torch.Tensor) -> torch.Tensor:
        """The velocity at `sigma`, in the dtype of those before: the last one where there is only one."""
        *before, (last_sigma, last) = self._known
        if not before:
            return last
        first_sigma, first = before[0]
        part = (sigma - last_sigma) / (last_sigma - first_sigma)
        part = part.nan_to_num(0, 0, 0)  # no line where both sigmas are the same, in a schedule of the user's own
        return (last.float() + part * (last.float() - first.float())).to(last.dtype)


class _Call:
    """A pipeline's call: the step that it is at, and the velocities of each call of the transformer in a step, of which
    true classifier-free guidance has two."""

    def __init__(self, pipe: DiffusionPipeline, speed_factor: float):
        self.pipe, self.speed_factor = pipe, speed_factor
        self.step, self.index = -1, object()
        self.in_step = 0
        self.velocities: list[Velocities] = []

    def __call__(self, compute: Callable, *args: Any, return_dict: bool = True, **kwargs: Any) -> Any:
        """The transformer's next call: `compute`, or what it would give."""
        scheduler, steps = self.pipe.scheduler, self.pipe.num_timesteps
        if scheduler.step_index != self.index:  # None at the first step, then one more a step
            self.index, self.step, self.in_step = scheduler.step_index, self.step + 1, 0
        self.in_step += 1
        is_computed = computed(steps, self.speed_factor)[self.step]
        if self.in_step > len(self.velocities):
            if not is_computed:
                raise UsageError(
                    "skipped steps need as many calls of the transformer in each step: use a recipe with cache=null"
                )
            self.velocities.append(Velocities())
        velocities = self.velocities[self.in_step - 1]
        sigma = scheduler.sigmas[len(scheduler.sigmas) - 1 - steps + self.step]
        if is_computed:
            out = compute(*args, return_dict=return_dict, **kwargs)
            velocities.add(sigma, out[0])
            return out
        sample = velocities.extrapolated(sigma)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)


class SkippedSteps:
    """What a pipeline and its transformer share: the pipeline's call that is going on, if one is."""

    def __init__(self, speed_factor: float):
        self.speed_factor = speed_factor
        self.call: _Call | None = None

    @contextmanager
    def during(self, call: _Call | None) -> Iterator[None]:
        """In the body the transformer is called by `call`, or else by hand."""
        before, self.call = self.call, call
        try:
            yield
        finally:
            self.call = before


class SkippingPipeline(DiffusionPipeline):
    """Mixin for a pipeline: of its calls' steps only those that are computed call the transformer.

    A callback may call what it likes: that is computed. So is every step of another pipeline that is made of the same
    parts.

    Raises:
        UsageError: at a call with a scheduler whose step isn't diffusers' Euler update.
    """

    skipped_steps: SkippedSteps

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not is_plain_euler(self.scheduler):
            raise UsageError(
                "skipped steps need diffusers' FlowMatchEulerDiscreteScheduler without stochastic_sampling, not this "
                f"{type(self.scheduler).__name__}: keep the pipeline's own, or use a recipe with cache=null"
            )
        skipped = self.skipped_steps
        if callback := kwargs.get("callback_on_step_end"):
            kwargs["callback_on_step_end"] = skipped.during(None)(callback)
        with skipped.during(_Call(self, skipped.speed_factor)):
            return super().__call__(*args, **kwargs)


class SkippingTransformer(nn.Module):
    """Mixin for its transformer. What comes between, such as its hooks, a skipped step doesn't need."""

    skipped_steps: SkippedSteps

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = self.skipped_steps.call
        return super().__call__(*args, **kwargs) if call is None else call(super().__call__, *args, **kwargs)


def _skip_steps(pipe: DiffusionPipeline, speed_factor: float) -> None:
    pipe.skipped_steps = pipe.transformer.skipped_steps = SkippedSteps(speed_factor)
    mix_in(pipe, SkippingPipeline)
    mix_in(pipe.transformer, SkippingTransformer)


def _apply(pipe: DiffusionPipeline, recipe: Recipe) -> str:
    if isinstance(recipe.cache, FirstBlockCache):
        pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=recipe.cache.threshold))
        return f"first-block cache, threshold {recipe.cache.threshold}"
    assert recipe.cache is not None
    if not recipe.loop_graph:  # which skips its steps itself
        _skip_steps(pipe, recipe.cache.speed_factor)
    return f"of {recipe.cache.speed_factor:g} steps one is computed, the others extrapolated"


OPTIMIZATION = Optimization(field="cache", needs=lambda recipe: Needs(), lossless=lambda recipe: False, apply=_apply)
