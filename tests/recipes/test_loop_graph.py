"""The denoising loop as one call of the transformer: the same latents bit for bit, in one range, captured as one graph.

Without a GPU the loop runs as it is, uncaptured: as `recipes.apply` puts it on the pipeline, without the graph around.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FluxImg2ImgPipeline,
    FluxTransformer2DModel,
)
from PIL import Image
from torch.profiler import ProfilerActivity, profile

import recipes
from export.runtime import library_of
from export.store import PackageStore
from recipes import Recipe, RecipeError
from recipes.euler import euler
from recipes.loop_graph import OPTIMIZATION, DenoisingLoop, OneStep
from tests.recipes.kontext import as_kontext, edit
from utils.compile_clock import CompileClock
from utils.cuda_graph import Graphed
from utils.errors import UsageError
from utils.ranges import annotate, watch

STEPS = Recipe(scheduler_sync_removal=True)
HOISTED = replace(STEPS, modulation="hoisted", hoisted_embeddings=True)
EAGER = pytest.mark.parametrize(
    "recipe",
    [STEPS, replace(STEPS, dtype="bfloat16"), HOISTED, replace(HOISTED, dtype="bfloat16")],
    ids=["float32", "bfloat16", "hoisted", "hoisted-bfloat16"],
)


def as_loop(pipe: Any) -> Any:
    """The pipeline with its loop in one call, on top of the recipe that was applied to it."""
    assert OPTIMIZATION.apply(pipe, Recipe()) == "all steps in one call of the transformer"
    return pipe


def pair(tiny: Callable, recipe: Recipe, change: Callable = lambda pipe: pipe) -> tuple[Any, Any]:
    """Two pipelines of a recipe, the second with its loop in one call."""
    pipes = []
    for _ in range(2):
        pipes.append(change(tiny(torch.bfloat16 if recipe.dtype == "bfloat16" else torch.float32)))
        recipes.apply(pipes[-1], recipe)
    return pipes[0], as_loop(pipes[1])


def with_guidance(pipe: Any) -> Any:
    """The pipeline with a small transformer like FLUX.1-dev's, which takes guidance; random weights."""
    torch.manual_seed(0)
    config = {**pipe.transformer.config, "guidance_embeds": True}
    pipe.register_modules(transformer=FluxTransformer2DModel.from_config(config).to(pipe.device, pipe.dtype))
    return pipe


CALLS: dict[str, dict[str, Any]] = {
    "plain": {"steps": 3},
    "one-step": {"steps": 1},
    "another-prompt-and-seed": {"steps": 3, "prompt": "two blue stars", "seed": 5},
    "batch": {"steps": 2, "batch": 3},
    "own-sigmas": {"sigmas": [1.0, 0.7, 0.65, 0.1]},
    "another-size": {"steps": 2, "height": 96, "width": 64},
    "negative-prompt-without-effect": {"steps": 2, "negative_prompt": "a green square"},
}


@EAGER
def test_latents_are_those_of_the_steps_bit_for_bit(tiny: Callable, draw: Callable, recipe: Recipe) -> None:
    steps, loop = pair(tiny, recipe)
    seen = []
    for name, options in CALLS.items():
        expected, got = (draw(pipe, output_type="latent", **options) for pipe in (steps, loop))
        assert torch.equal(got, expected), name
        seen.append(got)
    assert not torch.equal(seen[0], seen[2]), "a prompt and a seed matter here"


@EAGER
def test_guidance(tiny: Callable, draw: Callable, recipe: Recipe) -> None:
    steps, loop = pair(tiny, recipe, with_guidance)
    images = []
    for scale in (3.5, 1.0):
        options = {"guidance_scale": scale, "steps": 2, "batch": 2, "output_type": "latent"}
        images.append(draw(loop, **options))
        assert torch.equal(images[-1], draw(steps, **options))
    assert (images[0] - images[1]).abs().max() > 1e-3, "guidance matters here"


@EAGER
def test_kontext(tiny: Callable, draw: Callable, recipe: Recipe) -> None:
    steps, loop = pair(tiny, recipe, as_kontext)
    for options in (edit(), {**edit(), "batch": 2}, {"max_area": 64 * 64}):
        expected, got = (draw(pipe, steps=3, output_type="latent", **options) for pipe in (steps, loop))
        assert torch.equal(got, expected)


def test_images_and_return_values(tiny: Callable, draw: Callable) -> None:
    steps, loop = pair(tiny, STEPS)
    assert (draw(loop, steps=2) == draw(steps, steps=2)).all()
    ((image,),) = loop("a red circle", height=64, width=64, num_inference_steps=2, return_dict=False)
    assert image.size == (64, 64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_update_is_the_schedulers(dtype: torch.dtype) -> None:
    random = torch.Generator().manual_seed(0)
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(5)
    scheduler.set_begin_index(0)
    latents = torch.randn(2, 16, 64, generator=random).to(dtype)
    for i, t in enumerate(scheduler.timesteps):
        velocity = torch.randn(2, 16, 64, generator=random).to(dtype)
        (expected,) = scheduler.step(velocity, t, latents, return_dict=False)
        latents = euler(latents, velocity, scheduler.sigmas[i], scheduler.sigmas[i + 1])
        assert torch.equal(latents, expected)
        assert latents.dtype == expected.dtype == dtype


@EAGER
def test_transformer_runs_once_a_call_and_by_hand_as_ever(
    tiny: Callable, draw: Callable, predict: Callable, recipe: Recipe
) -> None:
    steps, loop = pair(tiny, recipe)
    assert torch.equal(predict(loop), predict(steps)), "no loop has been yet"
    calls: list[int] = []
    loop.transformer.register_forward_hook(lambda *_: calls.append(1))
    draw(loop, steps=4)
    assert len(calls) == 1
    assert torch.equal(predict(loop, 2), predict(steps, 2))


def test_one_range_for_the_loop(tiny: Callable, draw: Callable) -> None:
    _, loop = pair(tiny, STEPS)
    before = dict(vars(loop.scheduler))
    with annotate(loop), profile(activities=[ProfilerActivity.CPU]) as recorded:
        draw(loop, steps=3)
    events = [event for event in recorded.events() if event.is_user_annotation]
    names = [event.name for event in sorted(events, key=lambda event: event.time_range.start)]
    assert names == ["prompt_encoding", "denoising_loop", "decoding", "postprocessing"]
    (inside,) = (event.time_range for event in events if event.name == "denoising_loop")
    products = [e.time_range.start for e in recorded.events() if e.name == "aten::scaled_dot_product_attention"]
    in_loop = sum(inside.start <= start <= inside.end for start in products)
    blocks = len(loop.transformer.transformer_blocks) + len(loop.transformer.single_transformer_blocks)
    assert in_loop == 3 * blocks, "all steps' attention"
    assert vars(loop.scheduler).keys() - before.keys() <= {"steps", "num_inference_steps", "in_call"}


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "callback": ({"callback_on_step_end": lambda *_: {}}, "takes no callback_on_step_end: leave it out, or use a"),
    "guidance": ({"negative_prompt": "a cross", "true_cfg_scale": 2.0}, "takes no true_cfg_scale above 1: leave it"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_what_needs_the_host_between_steps(tiny: Callable, draw: Callable, name: str) -> None:
    options, words = REFUSED[name]
    steps, loop = pair(tiny, STEPS)
    with pytest.raises(UsageError, match=words) as raised:
        draw(loop, steps=2, **options)
    assert str(raised.value).endswith("use a recipe with loop_graph=false")
    assert "\n" not in str(raised.value)
    expected, got = (draw(pipe, steps=2, output_type="latent") for pipe in (steps, loop))
    assert torch.equal(got, expected), "nothing is left of the call that was refused"


def test_refuses_to_be_interrupted(tiny: Callable, draw: Callable) -> None:
    steps, loop = pair(tiny, STEPS)
    with pytest.raises(UsageError, match="can't be interrupted: use a recipe with loop_graph=false"):
        loop._interrupt = True
    assert loop.interrupt is False
    expected, got = (draw(pipe, steps=2, output_type="latent") for pipe in (steps, loop))
    assert torch.equal(got, expected)


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
def test_refuses_other_schedulers(tiny: Callable, draw: Callable, scheduler: Callable) -> None:
    pipe = tiny()
    pipe.scheduler = scheduler()
    with pytest.raises(UsageError, match="needs the FlowMatchEulerDiscreteScheduler it was applied to"):
        draw(as_loop(pipe))


def test_refuses_a_scheduler_put_there_later(tiny: Callable, draw: Callable) -> None:
    _, loop = pair(tiny, STEPS)
    loop.scheduler = FlowMatchEulerDiscreteScheduler.from_config(loop.scheduler.config)
    with pytest.raises(UsageError, match=r"it was applied to, without stochastic_sampling: keep it, or use"):
        draw(loop, steps=2)


def test_refuses_other_pipelines_and_leaves_them_alone(tiny: Callable) -> None:
    def image_to_image(pipe: Any) -> torch.Tensor:
        pipe.set_progress_bar_config(disable=True)
        image = Image.radial_gradient("L").resize((64, 64)).convert("RGB")
        size = {"height": 64, "width": 64, "max_sequence_length": 64, "generator": torch.Generator().manual_seed(0)}
        return pipe("a star", image=image, strength=0.5, num_inference_steps=4, output_type="latent", **size).images

    expected = image_to_image(FluxImg2ImgPipeline(**tiny().components))
    with pytest.raises(UsageError, match="is for FluxPipeline and FluxKontextPipeline, not FluxImg2ImgPipeline: use"):
        image_to_image(as_loop(FluxImg2ImgPipeline(**tiny().components)))
    _, loop = pair(tiny, STEPS)
    assert torch.equal(image_to_image(FluxImg2ImgPipeline(**loop.components)), expected), "another's parts, borrowed"


@EAGER
@pytest.mark.parametrize("interruption", [KeyboardInterrupt, RuntimeError])
def test_call_that_was_broken_off_leaves_nothing(
    tiny: Callable, draw: Callable, predict: Callable, recipe: Recipe, interruption: type[BaseException]
) -> None:
    steps, loop = pair(tiny, recipe)

    def interrupt(*_: Any) -> None:
        raise interruption

    hook = loop.transformer.proj_out.register_forward_pre_hook(interrupt)
    with pytest.raises(interruption):
        draw(loop, steps=3)
    hook.remove()
    assert torch.equal(predict(loop), predict(steps))
    expected, got = (draw(pipe, steps=2, output_type="latent") for pipe in (steps, loop))
    assert torch.equal(got, expected)


def test_stays_a_flux_pipeline(tiny: Callable, tmp_path: Path) -> None:
    steps, loop = pair(tiny, STEPS)
    for one, other in ((steps, loop), (steps.scheduler, loop.scheduler)):
        assert isinstance(other, type(one))
        assert type(other).__name__ == type(one).__name__
    loop.scheduler.save_pretrained(tmp_path)
    assert FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path).config.keys() == steps.scheduler.config.keys()


def test_needs_a_gpu(tiny: Callable) -> None:
    pipe = tiny()
    asked = Recipe(dtype="bfloat16", scheduler_sync_removal=True, cuda_graph=True, loop_graph=True)
    words = r"cuda_graph=True needs a cuda device, this is cpu; .* --recipe no_scheduler_sync$"
    with pytest.raises(RecipeError, match=words):
        recipes.apply(pipe, asked)
    assert not isinstance(pipe.scheduler, OneStep)
    assert "forward" not in vars(pipe.transformer)


@pytest.mark.slow
@pytest.mark.parametrize("kontext", [False, True], ids=["flux", "kontext"])
@pytest.mark.parametrize(
    "options",
    [{"execution": "compile"}, {"execution": "compile", "compile_scope": "whole"}, {"execution": "aoti"}],
    ids=["compile", "whole", "packages"],
)
def test_loop_is_of_the_steps_that_were_compiled(
    tiny: Callable, draw: Callable, tmp_path: Path, options: dict[str, Any], kontext: bool
) -> None:
    """The loop asks for no kind of step that the pipeline's own doesn't; what warms a capture up compiles all of it."""
    pipe = as_kontext(tiny()) if kontext else tiny()
    arguments = {"steps": 4, "output_type": "latent", **(edit() if kontext else {})}
    recipes.apply(pipe, replace(HOISTED if kontext else STEPS, **options), PackageStore(tmp_path))
    with CompileClock() as clock:
        expected = draw(pipe, **arguments)
    assert clock.seconds > 0
    library = library_of(pipe) if options["execution"] == "aoti" else None
    as_loop(pipe)
    assert library is None or library_of(pipe) is library, "the packages are found in the loop"
    with CompileClock() as clock:
        assert torch.equal(draw(pipe, **arguments), expected)
    assert clock.compilations == 0

    torch._dynamo.reset()
    loop, compiled = pipe.transformer.forward, []

    def capture(*args: Any, **kwargs: Any) -> Any:
        result = loop.warm_up(*args, **kwargs)
        with CompileClock() as clock:
            loop(*args, **kwargs)
        compiled.append(clock.compilations)
        return result

    pipe.transformer.forward = capture
    with CompileClock() as clock:
        assert not torch.equal(draw(pipe, **arguments), expected), "fewer than four steps"
    assert compiled == [0]
    assert (clock.compilations > 0) == (options["execution"] == "compile")


def on_gpu(tiny: Callable, recipe: Recipe, folder: Path, change: Callable = lambda pipe: pipe) -> tuple[Any, Any]:
    """Two pipelines of a recipe on a GPU: the first with a graph of a step, the second with one of the loop."""
    pipes = []
    for loop in (False, True):
        dtype = torch.bfloat16 if recipe.dtype == "bfloat16" else torch.float32
        pipes.append(change(tiny(dtype, torch.device("cuda"))))
        recipes.apply(pipes[-1], replace(recipe, cuda_graph=True, loop_graph=loop), PackageStore(folder))
    return pipes[0], pipes[1]


def graphs(pipe: Any) -> int:
    forward = pipe.transformer.forward
    assert isinstance(forward, Graphed)
    assert isinstance(forward.function, DenoisingLoop)
    assert forward.graphs is pipe.vae.decoder.forward.graphs
    return sum(function is forward.function for function, _ in forward.graphs.values)


CAPTURED = pytest.mark.parametrize(
    "recipe",
    [
        STEPS,
        replace(STEPS, dtype="bfloat16"),
        replace(HOISTED, dtype="bfloat16"),
        replace(HOISTED, dtype="bfloat16", modulation="offloaded"),
        replace(STEPS, dtype="bfloat16", execution="compile"),
        replace(STEPS, dtype="bfloat16", execution="compile", compile_scope="whole"),
        replace(HOISTED, dtype="bfloat16", execution="compile"),
        replace(HOISTED, dtype="bfloat16", execution="aoti"),
        recipes.named()["aoti"],
    ],
    ids=[
        *("float32", "bfloat16", "hoisted", "offloaded", "compile", "whole", "hoisted-compile", "hoisted-packages"),
        "fastest-packages",
    ],
)


@pytest.mark.gpu
@CAPTURED
def test_captured_is_the_captured_steps_bit_for_bit(
    tiny: Callable, draw: Callable, recipe: Recipe, tmp_path: Path
) -> None:
    steps, loop = on_gpu(tiny, recipe, tmp_path)

    def equal(**options: Any) -> None:
        expected, got = (draw(pipe, output_type="latent", **options) for pipe in (steps, loop))
        assert torch.equal(got, expected), options

    equal(steps=4)
    first = draw(loop, steps=4, output_type="latent")
    kept = first.clone()
    equal(steps=4, prompt="two blue stars", seed=5)
    equal(sigmas=[1.0, 0.7, 0.65, 0.1])
    assert graphs(loop) == 1, "another prompt, seed and other sigmas are the same kind of call"
    equal(steps=2)
    assert graphs(loop) == 2
    equal(steps=4, seed=3)
    if recipe.execution != "aoti":  # a package for each would take a minute
        equal(steps=3, batch=2)
        equal(steps=3, batch=2, prompt="a white cross", seed=8)
        assert graphs(loop) == 3
        equal(steps=2, height=96, width=64)
        assert graphs(loop) == 4
    assert torch.equal(first, kept), "no later call writes to a result"
    assert torch.equal(draw(loop, steps=4, output_type="latent"), kept)
    for options, words in REFUSED.values():
        with pytest.raises(UsageError, match=words):
            draw(loop, steps=4, **options)


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", [STEPS, HOISTED], ids=["plain", "hoisted"])
def test_captured_guidance(tiny: Callable, draw: Callable, recipe: Recipe, tmp_path: Path) -> None:
    steps, loop = on_gpu(tiny, replace(recipe, dtype="bfloat16"), tmp_path, with_guidance)
    images = []
    for scale in (3.5, 1.0):
        expected, got = (
            draw(pipe, guidance_scale=scale, steps=3, batch=2, output_type="latent") for pipe in (steps, loop)
        )
        assert torch.equal(got, expected)
        images.append(got)
    assert not torch.equal(*images), "guidance matters here"
    assert graphs(loop) == 1, "the scale is an input"


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", [STEPS, replace(HOISTED, execution="compile")], ids=["plain", "hoisted-compile"])
def test_captured_kontext(tiny: Callable, draw: Callable, recipe: Recipe, tmp_path: Path) -> None:
    steps, loop = on_gpu(tiny, replace(recipe, dtype="bfloat16"), tmp_path, as_kontext)
    for options in (edit(), {**edit(), "batch": 2}, {**edit(), "prompt": "a star"}):
        expected, got = (draw(pipe, steps=3, output_type="latent", **options) for pipe in (steps, loop))
        assert torch.equal(got, expected)
    assert graphs(loop) == 2, "for one image and for two"


@pytest.mark.gpu
def test_one_launch_a_call(tiny: Callable, draw: Callable, waiting_is_an_error: Callable, tmp_path: Path) -> None:
    steps, loop = on_gpu(tiny, replace(HOISTED, dtype="bfloat16"), tmp_path)

    def launches(pipe: Any) -> int:
        draw(pipe, steps=5, output_type="latent")
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
            draw(pipe, "a blue star", seed=1, steps=5, output_type="latent")
            torch.cuda.synchronize()
        return sum(event.name.startswith("cudaGraphLaunch") for event in recorded.events())

    assert (launches(steps), launches(loop)) == (2 + 5, 2 + 1), "modulation and embeddings, and then the steps"
    with watch(loop, lambda stage: waiting_is_an_error() if stage == "denoising_loop" else nullcontext()):
        draw(loop, "a white cross", steps=5)


@pytest.mark.gpu
def test_fewer_graphs_than_numbers_of_steps_make_way(tiny: Callable, draw: Callable, tmp_path: Path) -> None:
    steps, loop = on_gpu(tiny, STEPS, tmp_path)
    loop.transformer.forward.graphs.limit = 2
    for number in (1, 2, 3, 1, 3):
        expected, got = (draw(pipe, steps=number, output_type="latent") for pipe in (steps, loop))
        assert torch.equal(got, expected)
    assert graphs(loop) == 2


@pytest.mark.gpu
@torch.no_grad()
def test_captured_loop_reads_weights_where_they_lie(tiny: Callable, draw: Callable, tmp_path: Path) -> None:
    """What a LoRA needs: weights are written in place, those of the hoisted modulation too."""
    steps, loop = on_gpu(tiny, HOISTED, tmp_path)
    before = draw(loop, steps=3, output_type="latent")
    for pipe in (steps, loop):
        pipe.transformer.proj_out.weight.mul_(0.5)
        pipe.transformer.norm_out.linear.weight.mul_(0.5)
    expected, got = (draw(pipe, steps=3, output_type="latent") for pipe in (steps, loop))
    assert torch.equal(got, expected)
    assert not torch.equal(got, before)
    assert graphs(loop) == 1


@pytest.mark.gpu
def test_called_by_hand_between_captured_loops(
    tiny: Callable, draw: Callable, predict: Callable, tmp_path: Path
) -> None:
    steps, loop = on_gpu(tiny, HOISTED, tmp_path)
    for _ in range(2):
        assert torch.equal(predict(loop), predict(steps))
        expected, got = (draw(pipe, steps=3, output_type="latent") for pipe in (steps, loop))
        assert torch.equal(got, expected)
    assert graphs(loop) == 2
