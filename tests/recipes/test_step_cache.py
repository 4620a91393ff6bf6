"""Skipped steps: which ones, what stands in for them, and that every way of running takes them alike."""

from __future__ import annotations

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FluxImg2ImgPipeline,
    FluxPipeline,
)
from PIL import Image

import recipes
from export.runtime import library_of
from export.store import PackageStore
from recipes import Recipe, StepSkipping, loop_graph
from recipes.step_cache import Velocities, computed
from tests.recipes.kontext import as_kontext, edit
from utils.compile_clock import CompileClock
from utils.cuda_graph import Graphed
from utils.errors import UsageError
from utils.ranges import DENOISING_LOOP, DENOISING_STEP, watch

PLAIN = Recipe(scheduler_sync_removal=True)
HOISTED = replace(PLAIN, modulation="hoisted", hoisted_embeddings=True)
HALF = StepSkipping(2)


def numbers(steps: int, speed_factor: float) -> list[int]:
    return [step for step, is_computed in enumerate(computed(steps, speed_factor)) if is_computed]


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7, 28, 50, 1000])
@pytest.mark.parametrize("speed_factor", [1.0, 1.1, 1.5, 2.0, 2.8, 3.0, 4.0, 7.0, 28.0, 1e6])
def test_computes_so_many_evenly(steps: int, speed_factor: float) -> None:
    places = numbers(steps, speed_factor)
    assert len(computed(steps, speed_factor)) == steps
    assert len(places) == max(1, round(steps / speed_factor))
    assert places[0] == 0, "nothing is known before the first"
    assert len(places) == 1 or places[-1] == steps - 1, "whose error nothing would make good"
    assert np.ptp(np.diff(places)) <= 1 if len(places) > 1 else True


def test_half_of_28_steps() -> None:
    assert numbers(28, 2.0) == [0, 2, 4, 6, 8, 10, 12, 15, 17, 19, 21, 23, 25, 27]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extrapolates_along_a_line(dtype: torch.dtype) -> None:
    random = torch.Generator().manual_seed(0)
    first, last = (torch.randn(2, 3, 4, generator=random).to(dtype) for _ in range(2))
    sigmas = torch.tensor([1.0, 0.75, 0.5, 0.25])
    velocities = Velocities()
    velocities.add(sigmas[0], first)
    assert velocities.extrapolated(sigmas[1]) is first, "nothing is known of a slope"
    velocities.add(sigmas[2], last)
    out = velocities.extrapolated(sigmas[3])
    assert out.dtype == dtype
    expected = last.double() + 0.5 * (last.double() - first.double())  # half of the way between the two
    tolerance = 1e-6 if dtype == torch.float32 else 0.01
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)
    velocities.add(sigmas[3], last)
    assert torch.equal(velocities.extrapolated(sigmas[3] - 0.1), last), "the last two count, and they are alike"


class Reference:
    """The transformer's calls of a pipeline by this file's own words: those of skipped steps with what lies on the line
    through the two before. `streams` calls a step."""

    def __init__(self, pipe: DiffusionPipeline, steps: int, speed_factor: float, streams: int = 1):
        self.pipe, self.forward = pipe, pipe.transformer.forward
        self.kept, self.steps, self.streams, self.calls = set(numbers(steps, speed_factor)), steps, streams, 0
        self.known: list[list[tuple[float, torch.Tensor]]] = [[] for _ in range(streams)]
        pipe.transformer.forward = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        (step, stream), self.calls = divmod(self.calls, self.streams), self.calls + 1
        sigmas = self.pipe.scheduler.sigmas
        sigma, known = float(sigmas[len(sigmas) - 1 - self.steps + step]), self.known[stream]
        if step in self.kept:
            known.append((sigma, self.forward(*args, **kwargs)[0]))
            return (known[-1][1],)
        if len(known) == 1:
            return (known[0][1],)
        (sigma_0, velocity_0), (sigma_1, velocity_1) = known[-2:]
        part = (sigma - sigma_1) / (sigma_1 - sigma_0)
        return (((1 + part) * velocity_1.double() - part * velocity_0.double()).to(velocity_1.dtype),)


def skipping(pipe: Any, recipe: Recipe = PLAIN, speed_factor: float = 2.0, **more: Any) -> Any:
    recipes.apply(pipe, replace(recipe, cache=StepSkipping(speed_factor)), **more)
    return pipe


def count(pipe: Any) -> list[int]:
    """As many elements as the transformer's last block is called from here on."""
    calls: list[int] = []
    block = pipe.transformer.single_transformer_blocks[-1]
    forward = block.forward

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return forward(*args, **kwargs)

    block.forward = counted
    return calls


@pytest.mark.parametrize("speed_factor", [1.5, 2.0, 4.0])
@pytest.mark.parametrize("batch", [1, 2])
def test_latents_are_those_of_the_rule(tiny: Callable, draw: Callable, speed_factor: float, batch: int) -> None:
    pipe, options = skipping(tiny(), PLAIN, speed_factor), {"batch": batch, "output_type": "latent"}
    calls = count(pipe)
    for steps in (8, 5):
        calls.clear()
        expected = tiny()
        reference = Reference(expected, steps, speed_factor)
        torch.testing.assert_close(
            draw(pipe, steps=steps, **options), draw(expected, steps=steps, **options), rtol=1e-4, atol=1e-4
        )
        assert len(calls) == len(numbers(steps, speed_factor))
        assert reference.calls == steps


def test_one_of_one_steps_is_every_step(tiny: Callable, draw: Callable) -> None:
    pipe, plain = skipping(tiny(), PLAIN, 1), tiny()
    assert np.array_equal(draw(pipe, steps=3), draw(plain, steps=3))


def test_nothing_is_left_for_the_next_call(tiny: Callable, draw: Callable) -> None:
    pipe = skipping(tiny())
    first = draw(pipe, steps=6)
    draw(pipe, "two blue stars", steps=4, batch=2)
    assert np.array_equal(draw(pipe, steps=6), first)


def test_closer_than_as_many_plain_steps(tiny: Callable, draw: Callable, error_of: Callable) -> None:
    options = {"output_type": "latent", "height": 256, "width": 256}
    every, half = (draw(tiny(), steps=steps, **options) for steps in (28, 14))
    skipped = draw(skipping(tiny()), steps=28, **options)
    assert 0 < error_of(skipped, every) < error_of(half, every) / 2


@pytest.mark.parametrize("sync_removal", [True, False])
def test_from_an_image(tiny: Callable, sync_removal: bool) -> None:
    """Its call begins in the middle of the scheduler's steps."""

    def redraw(pipe: Any) -> torch.Tensor:
        pipe.set_progress_bar_config(disable=True)
        image = Image.radial_gradient("L").resize((64, 64)).convert("RGB")
        options = {"height": 64, "width": 64, "max_sequence_length": 64, "generator": torch.Generator().manual_seed(0)}
        return pipe("a star", image=image, strength=0.7, num_inference_steps=10, output_type="latent", **options).images

    pipe = skipping(FluxImg2ImgPipeline(**tiny().components), replace(PLAIN, scheduler_sync_removal=sync_removal))
    expected = FluxImg2ImgPipeline(**tiny().components)
    reference = Reference(expected, 7, 2.0)
    calls = count(pipe)
    torch.testing.assert_close(redraw(pipe), redraw(expected), rtol=1e-4, atol=1e-4)
    assert (reference.calls, len(calls)) == (7, len(numbers(7, 2.0)))


def test_true_guidance_has_two_velocities_a_step(tiny: Callable, draw: Callable) -> None:
    pipe, expected = skipping(tiny()), tiny()
    reference = Reference(expected, 6, 2.0, streams=2)
    options = {"steps": 6, "negative_prompt": "a cross", "true_cfg_scale": 2.0, "output_type": "latent"}
    calls = count(pipe)
    torch.testing.assert_close(draw(pipe, **options), draw(expected, **options), rtol=1e-4, atol=1e-4)
    assert (reference.calls, len(calls)) == (12, 2 * len(numbers(6, 2.0)))


def test_by_hand_all_is_computed_also_after_a_call_that_broke(
    tiny: Callable, draw: Callable, predict: Callable
) -> None:
    pipe, plain = skipping(tiny()), tiny()
    assert torch.equal(predict(pipe), predict(plain))
    expected = draw(pipe, steps=4)

    def stop(*_: Any) -> dict:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        draw(pipe, steps=4, callback_on_step_end=stop)
    for seed in range(3):
        assert torch.equal(predict(pipe, seed=seed), predict(plain, seed=seed))
    assert np.array_equal(draw(pipe, steps=4), expected)


def test_callbacks_see_every_step(tiny: Callable, draw: Callable) -> None:
    seen: list[int] = []
    draw(skipping(tiny()), steps=6, callback_on_step_end=lambda pipe, step, *_: seen.append(step) or {})
    assert seen == [0, 1, 2, 3, 4, 5]


class OtherUpdate(FlowMatchEulerDiscreteScheduler):
    def step(self, *args: Any, **kwargs: Any) -> Any:
        raise AssertionError("not called")


@pytest.mark.parametrize(
    "scheduler",
    [
        FlowMatchHeunDiscreteScheduler,
        lambda: OtherUpdate(use_dynamic_shifting=True),
        lambda: FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, stochastic_sampling=True),
    ],
    ids=["heun", "own-step", "stochastic"],
)
def test_refuses_other_schedulers_in_one_line(tiny: Callable, draw: Callable, scheduler: Callable) -> None:
    pipe = skipping(tiny())
    pipe.scheduler = scheduler()
    name = type(pipe.scheduler).__name__
    with pytest.raises(UsageError, match=f"not this {name}: keep .* recipe with cache=null$"):
        draw(pipe, steps=2)


@pytest.mark.parametrize("loop", [False, True], ids=["steps", "loop"])
def test_sigmas_that_are_the_same(tiny: Callable, draw: Callable, loop: bool) -> None:
    sigmas, pipe = [1, 0.9, 0.8, 0.8, 0.6, 0.5, 0.4, 0.3, 0.2], tiny()
    assert numbers(9, 1.5)[1:3] == [2, 3], "of which two that are computed are alike"
    if loop:
        recipes.apply(pipe, PLAIN)
        loop_graph.OPTIMIZATION.apply(pipe, replace(PLAIN, cache=StepSkipping(1.5)))
    else:
        skipping(pipe, PLAIN, 1.5)
    assert draw(pipe, sigmas=sigmas, output_type="latent").isfinite().all()


@pytest.mark.parametrize("after", range(5))
def test_a_callback_calls_what_it_likes(tiny: Callable, draw: Callable, predict: Callable, after: int) -> None:
    pipe, plain, shares = skipping(tiny()), tiny(), skipping(tiny())
    expected = draw(pipe, steps=6)
    other = FluxPipeline(**{**pipe.components, "scheduler": shares.scheduler})
    other.set_progress_bar_config(disable=True)

    def call(_: Any, step: int, *__: Any) -> dict:
        if step == after:
            assert torch.equal(predict(pipe), predict(plain))
            assert np.array_equal(draw(other, steps=2), draw(plain, steps=2))
            assert np.array_equal(draw(pipe_of_its_own, steps=5), own)
        return {}

    pipe_of_its_own = copy.copy(pipe)
    pipe_of_its_own.scheduler = shares.scheduler
    own = draw(pipe_of_its_own, steps=5)
    assert np.array_equal(draw(pipe, steps=6, callback_on_step_end=call), expected)


def test_more_calls_in_a_step_than_before_are_refused(tiny: Callable, draw: Callable) -> None:
    pipe = skipping(tiny())
    step = pipe.scheduler.step

    def stepped(velocity: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        out = step(velocity, *args, **kwargs)
        pipe.transformer(**pipe.asked)
        return out

    pipe.transformer.register_forward_pre_hook(
        lambda _, args, kwargs: vars(pipe).update(asked=kwargs), with_kwargs=True
    )
    pipe.scheduler.step = stepped
    with pytest.raises(UsageError, match="as many calls of the transformer in each step: use a recipe with cache=null"):
        draw(pipe, steps=6)


def test_stays_the_pipeline_and_the_transformer_that_they_were(tiny: Callable) -> None:
    plain, pipe = tiny(), skipping(tiny())
    for one, other in ((plain, pipe), (plain.transformer, pipe.transformer)):
        assert isinstance(other, type(one))
        assert type(other).__name__ == type(one).__name__


def test_a_copy_skips_by_its_own_steps(tiny: Callable, draw: Callable) -> None:
    pipe = skipping(tiny())
    expected = draw(pipe, steps=6)
    copied = copy.deepcopy(pipe)
    draw(pipe, steps=3)
    assert np.array_equal(draw(copied, steps=6), expected)

    def at_once(pipe: Any) -> list[np.ndarray]:
        return [draw(pipe, steps=6) for _ in range(3)]

    with ThreadPoolExecutor(2) as threads:
        assert all(np.array_equal(drawn, expected) for pair in threads.map(at_once, (pipe, copied)) for drawn in pair)
    calls = count(copied)
    borrowed = FluxPipeline(**copied.components)  # which skips none
    borrowed.set_progress_bar_config(disable=True)
    draw(borrowed, steps=6)
    assert len(calls) == 6


EVERY_WAY = pytest.mark.parametrize(
    "recipe",
    [PLAIN, replace(PLAIN, dtype="bfloat16"), HOISTED, replace(HOISTED, dtype="bfloat16")],
    ids=["float32", "bfloat16", "hoisted", "hoisted-bfloat16"],
)


@EVERY_WAY
@pytest.mark.parametrize("kontext", [False, True], ids=["flux", "kontext"])
def test_one_call_for_all_steps_gives_the_same_bits(
    tiny: Callable, draw: Callable, recipe: Recipe, kontext: bool
) -> None:
    dtype = torch.bfloat16 if recipe.dtype == "bfloat16" else torch.float32
    steps, loop = (as_kontext(tiny(dtype)) if kontext else tiny(dtype) for _ in range(2))
    skipping(steps, recipe)
    recipes.apply(loop, recipe)
    loop_graph.OPTIMIZATION.apply(loop, replace(recipe, cache=HALF))
    calls = count(loop)
    for options in ({"steps": 7}, {"steps": 4, "batch": 2}, {"sigmas": [1.0, 0.7, 0.65, 0.1]}):
        options |= edit() if kontext else {}
        calls.clear()
        got = draw(loop, output_type="latent", **options)
        assert len(calls) == len(numbers(len(options.get("sigmas", ())) or options["steps"], 2.0))
        assert torch.equal(got, draw(steps, output_type="latent", **options))


@pytest.mark.parametrize("speed_factor", [1.0, 2.0, 7.0])
def test_what_warms_a_capture_up_does_all_that_the_loop_does(speed_factor: float) -> None:
    called = []

    def step(hidden_states: torch.Tensor, timestep: torch.Tensor) -> tuple[torch.Tensor]:
        called.append(timestep)
        return (hidden_states + timestep,)

    def drawn(timesteps: int) -> torch.Tensor:
        loop = loop_graph.DenoisingLoop(step, speed_factor)
        sigmas, noise = torch.linspace(1, 0, timesteps + 1), torch.ones(1, 2, 3)
        return loop.warm_up(hidden_states=noise, timestep=sigmas[:-1, None], sigmas=sigmas, latent_tokens=2)[0]

    for timesteps, calls in ((1, 1), (2, 2), (7, 2)):
        called.clear()
        assert drawn(timesteps).isfinite().all()
        assert len(called) == calls


@pytest.mark.slow
@pytest.mark.parametrize("scope", ["regional", "whole"])
def test_compiled(tiny: Callable, draw: Callable, error_of: Callable, scope: str) -> None:
    recipe = replace(HOISTED if scope == "regional" else PLAIN, execution="compile", compile_scope=scope)
    pipe, eager = skipping(tiny(), recipe), skipping(tiny())
    options = {"steps": 6, "output_type": "latent"}
    assert error_of(draw(pipe, **options), draw(eager, **options)) < 1e-4
    with CompileClock() as clock:
        draw(pipe, "two blue stars", seed=5, **options)
    assert clock.compilations == 0


@pytest.mark.slow
def test_packages_are_those_of_every_step(tiny: Callable, draw: Callable, error_of: Callable, tmp_path: Path) -> None:
    recipe, options = replace(PLAIN, execution="aoti"), {"steps": 6, "output_type": "latent"}
    plain = tiny()
    recipes.apply(plain, recipe, PackageStore(tmp_path))
    draw(plain, **options)
    files = sorted(tmp_path.iterdir())
    assert library_of(plain) is not None
    pipe = skipping(tiny(), recipe, packages=PackageStore(tmp_path, build=False))
    assert error_of(draw(pipe, **options), draw(skipping(tiny()), **options)) < 1e-4
    assert sorted(tmp_path.iterdir()) == files


GRAPHS = replace(PLAIN, dtype="bfloat16", cuda_graph=True)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "recipe",
    [GRAPHS, replace(GRAPHS, execution="compile"), recipes.named()["aoti"]],
    ids=["eager", "compile", "fastest-packages"],
)
def test_captured(
    tiny: Callable, draw: Callable, error_of: Callable, waiting_is_an_error: Callable, recipe: Recipe, tmp_path: Path
) -> None:
    """As steps under a graph each and in one launch, with the same bits; nothing waits, and results are kept."""
    cuda, options = torch.device("cuda"), {"steps": 7, "output_type": "latent"}
    steps, loop = (
        skipping(tiny(torch.bfloat16, cuda), replace(recipe, loop_graph=one), packages=PackageStore(tmp_path))
        for one in (False, True)
    )
    every = tiny(torch.bfloat16, cuda)
    recipes.apply(every, recipe, PackageStore(tmp_path))
    assert isinstance(steps.transformer.forward, Graphed)
    first = draw(steps, **options)
    kept = first.clone()
    assert torch.equal(draw(loop, **options), first)
    assert 1e-4 < error_of(first, draw(every, **options)) < 0.5, "steps were skipped, and not for noise"
    other = {"prompt": "two blue stars", "seed": 5, **options}
    assert torch.equal(draw(loop, **other), draw(steps, **other))
    assert torch.equal(first, kept)
    assert torch.equal(draw(steps, **options), kept)

    def waits(stage: str) -> AbstractContextManager:
        return waiting_is_an_error() if stage in (DENOISING_STEP, DENOISING_LOOP) else nullcontext()

    for pipe in (steps, loop):
        with watch(pipe, waits):
            draw(pipe, "a white cross", **options)
