"""Every rung of the ladder on the embedded model: as exact as it says, nothing compiled twice, nothing waited for.

What a rung rounds is compared with what plain diffusers rounds in bfloat16, both against plain float32: in the latents
that the decoder gets and in the image's bytes, geometric means over some images. Rounding can make another picture of
one of a dozen, which would be most of their arithmetic mean.

On a GPU all rungs that it can run, and what has to be asked for beside them. On a CPU those without packages (which
tests/export has), and what is compiled goes through Dynamo alone: Inductor's C++ takes minutes a rung there
(test_compile.py has some of it). Kontext, whose calls have an image's tokens behind the noise's, has the topmost rungs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import geometric_mean
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile

import recipes
from export.store import PackageStore
from recipes import LADDER, Recipe
from tests.recipes.kontext import as_kontext, gradient
from utils.compile_clock import CompileClock
from utils.ranges import DENOISING_LOOP, DENOISING_STEP, annotate, watch
from utils.relative_error import relative_error
from utils.request import Request

PROMPTS = ("a red circle", "two blue squares", "a green star", "a white cross above a circle")
SQUARE = [Request(text, 64, 64, 2, 0.0, 64, seed=seed) for seed in range(3) for text in PROMPTS]
# Two images a call and another size at once: compiled once more, and not twice.
WIDE_PAIRS = [Request(text, 64, 96, 2, 0.0, 64, batch=2, seed=10 + i) for i, text in enumerate(PROMPTS)]
MEASURED = ("latents", "image")
OF_KONTEXT = {
    "cpu": ("hoisted_embeddings",),
    "cuda": ("compiled", "float8_attention", "int8_adaln", "loop_graph", "aoti"),
}

# What has to be asked for, a recipe of each.
BESIDE_THE_LADDER = {
    "cudnn": "channels_last,cuda_graph=true,attention=cudnn",
    "triton_fp8": "channels_last,cuda_graph=true,attention=triton_fp8",
    "float8_per_tensor": "channels_last,quantization=float8_per_tensor",
    "whole": "channels_last,compile_scope=whole",
    "offloaded": "int8_adaln,modulation=offloaded",
}

# A search over kernels of minutes at each compilation, or five packages of half a minute for each size.
SLOWEST = ("max_autotune", "inductor_flags", "aoti")

# Times bfloat16's error. On a CPU rounding at other places, Inductor's, came to 0.93 to 1.04 of it, and what is in
# float8 to 7; all formats of the topmost rungs, emulated, to 9 (arithmetic means to 37).
LOSSLESS, LOSSY = 1.25, 12.0

Drawn = dict[str, torch.Tensor]


def draw(pipe: DiffusionPipeline, request: Request) -> Drawn:
    """MEASURED, float32 on the CPU: latents [batch, 16, height / 8, width / 8], bytes [batch, height, width, 3]."""
    with patch.object(pipe.vae, "decode", wraps=pipe.vae.decode) as decode:
        images = request.run(pipe)
    latents = decode.call_args.args[0].float().cpu()
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images])).float()
    return dict(zip(MEASURED, (latents, pixels), strict=True))


def one_by_one(pipe: DiffusionPipeline, request: Request) -> Drawn:
    """What `draw` gives, each image in a call of its own."""
    drawn = [draw(pipe, replace(request, batch=1, seed=request.seed + i)) for i in range(request.batch)]
    return {name: torch.cat([one[name] for one in drawn]) for name in MEASURED}


def errors(drawn: list[Drawn], exact: list[Drawn]) -> dict[str, float]:
    """Of each of MEASURED, the geometric mean of all images' relative errors, each at least 1e-6."""
    return {
        name: geometric_mean(
            max(relative_error(image, other), 1e-6)
            for one, plain in zip(drawn, exact, strict=True)
            for image, other in zip(one[name], plain[name], strict=True)
        )
        for name in MEASURED
    }


@dataclass(frozen=True)
class Requests:
    """SQUARE and WIDE_PAIRS, of a pipeline that draws or, with an image, of Kontext that edits it."""

    image: Path | None

    @property
    def square(self) -> list[Request]:
        return [replace(request, image=self.image) for request in SQUARE]

    @property
    def wide(self) -> list[Request]:
        return [replace(request, image=self.image) for request in WIDE_PAIRS]


@pytest.fixture(scope="module")
def to_edit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("image") / "gradient.png"
    gradient().save(path)
    return path


@pytest.fixture(scope="module")
def load(tiny: Callable) -> Callable[..., DiffusionPipeline]:
    """load(dtype, device, kontext)"""

    def pipeline(dtype: torch.dtype, device: torch.device, kontext: bool) -> DiffusionPipeline:
        return as_kontext(tiny(dtype, device)) if kontext else tiny(dtype, device)

    return pipeline


@dataclass(frozen=True)
class Plain:
    """Plain diffusers on a device, images one by one, of `Requests`: float32, and bfloat16's errors."""

    square: list[Drawn]
    square_rounding: dict[str, float]
    wide: list[Drawn]
    wide_rounding: dict[str, float]


@pytest.fixture(scope="module")
def plain(load: Callable) -> Callable[[torch.device, Requests], Plain]:
    """plain(device, requests)"""

    @functools.cache
    def on(device: torch.device, requests: Requests) -> Plain:
        kontext = requests.image is not None
        exact, rounded = load(torch.float32, device, kontext), load(torch.bfloat16, device, kontext)
        square = [draw(exact, one) for one in requests.square]
        wide = [one_by_one(exact, pair) for pair in requests.wide]
        return Plain(
            square,
            errors([draw(rounded, one) for one in requests.square], square),
            wide,
            errors([one_by_one(rounded, pair) for pair in requests.wide], wide),
        )

    return on


@dataclass(frozen=True)
class Climbed:
    """A rung's recipe on a pipeline that has drawn once.

    requests: what it draws. compilations: that the first took. whole_graphs: of each call of torch.compile, whether it
    was asked for no graph break.
    """

    name: str
    recipe: Recipe
    device: torch.device
    requests: Requests
    pipe: DiffusionPipeline
    compilations: int
    whole_graphs: list[bool]

    @property
    def cuda_graphs(self) -> int:
        return len(self.pipe.transformer.forward.graphs.values) if self.recipe.cuda_graph else 0


def places() -> Iterator[Any]:
    for device in ("cpu", "cuda"):
        for name in (*(change.__name__ for change in LADDER), *BESIDE_THE_LADDER):
            marks = [pytest.mark.slow, *([pytest.mark.gpu] if device == "cuda" else [])]
            marks += [pytest.mark.timeout(3600)] if name in SLOWEST else []
            yield pytest.param((torch.device(device), name, False), marks=marks, id=f"{device}-{name}")
            if name in OF_KONTEXT[device]:
                yield pytest.param((torch.device(device), name, True), marks=marks, id=f"{device}-{name}-kontext")


def not_here(name: str, device: torch.device) -> str | None:
    """Why a rung isn't tested on `device`, though it can run."""
    if device.type == "cuda":
        return None
    if name in ("max_autotune", "inductor_flags"):
        return "differs from the rung below in what it tells Inductor, which isn't run here on a CPU"
    return "packages on a CPU are tested in tests/export" if name == "aoti" else None


def recipe_of(name: str, device: torch.device) -> tuple[Recipe, str | None]:
    """A rung's recipe, or that of one of BESIDE_THE_LADDER, and why it can't run on `device`."""
    if name in BESIDE_THE_LADDER:
        recipe = recipes.parse(BESIDE_THE_LADDER[name])
        return recipe, recipes.refusal(recipe, device)
    (found,) = (rung for rung in recipes.climb(lambda rung: recipes.refusal(rung.recipe, device)) if rung.name == name)
    return found.recipe, found.skipped


@pytest.fixture(scope="module", params=places())
def rung(
    request: pytest.FixtureRequest, load: Callable, to_edit: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Climbed]:
    device, name, kontext = request.param
    requests = Requests(to_edit if kontext else None)
    recipe, refusal = recipe_of(name, device)
    if reason := refusal or not_here(name, device):
        pytest.skip(reason)
    whole_graphs: list[bool] = []
    compile_ = torch.compile

    def compile_noting(function: Callable, *, fullgraph: bool = False, **options: Any) -> Callable:
        whole_graphs.append(fullgraph)
        if device.type == "cpu":
            options = {"dynamic": options["dynamic"], "backend": "eager"}
        return compile_(function, fullgraph=fullgraph, **options)

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    pipe = load(torch.float32, device, kontext)
    with CompileClock() as clock:
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(torch, "compile", compile_noting)
            recipes.apply(pipe, recipe, PackageStore(tmp_path_factory.mktemp(name)))
        draw(pipe, requests.square[0])
    yield Climbed(name, recipe, device, requests, pipe, clock.compilations, whole_graphs)
    torch._dynamo.reset()


def assert_exact(rung: Climbed, found: dict[str, float], rounding: dict[str, float]) -> None:
    limit = LOSSLESS if recipes.is_lossless(rung.recipe) else LOSSY
    assert all(found[name] <= limit * rounding[name] for name in MEASURED), (found, rounding)


def test_as_exact_as_it_says(rung: Climbed, plain: Callable) -> None:
    exact = plain(rung.device, rung.requests)
    assert all(1e-3 < rounding < 0.1 for rounding in exact.square_rounding.values()), "there is something to compare"
    found = errors([draw(rung.pipe, one) for one in rung.requests.square], exact.square)
    assert_exact(rung, found, exact.square_rounding)
    if not recipes.is_lossless(rung.recipe):
        assert found["latents"] > exact.square_rounding["latents"], "float8 is on"


def test_whole_graphs_compiled_once(rung: Climbed) -> None:
    compiled = rung.recipe.execution == "compile"
    assert bool(rung.whole_graphs) == compiled
    assert all(rung.whole_graphs), "fullgraph=True: a graph break is an error"
    assert not torch._dynamo.utils.counters["graph_break"]
    assert (rung.compilations > 0) == (rung.recipe.execution != "eager")
    graphs = rung.cuda_graphs
    with CompileClock() as clock, torch._dynamo.config.patch(error_on_recompile=True):
        for other in rung.requests.square[1:4]:
            assert other.prompt != rung.requests.square[0].prompt
            draw(rung.pipe, replace(other, seed=other.seed + 100))
    assert clock.compilations == 0
    assert rung.cuda_graphs == graphs


def test_two_images_of_another_size(rung: Climbed, plain: Callable) -> None:
    """Each of a call's two images is the one that a call of its own gives, up to rounding."""
    exact = plain(rung.device, rung.requests)
    found = errors([draw(rung.pipe, pair) for pair in rung.requests.wide], exact.wide)
    assert_exact(rung, found, exact.wide_rounding)
    swapped = [{name: images.flip(0) for name, images in pair.items()} for pair in exact.wide]
    limit = LOSSY * exact.wide_rounding["latents"]
    assert errors(swapped, exact.wide)["latents"] > limit, "one image in the other's place would be told"
    with CompileClock() as clock, torch._dynamo.config.patch(error_on_recompile=True):
        draw(rung.pipe, replace(rung.requests.wide[0], prompt="a white star", seed=77))
        draw(rung.pipe, rung.requests.square[0])
    assert clock.compilations == 0


def loop_waits_on_a_gpu(rung: Climbed, waiting_is_an_error: Callable) -> bool:
    """Whether PyTorch would wait for the GPU in the denoising loop of a call."""

    def enter(stage: str) -> AbstractContextManager:
        return waiting_is_an_error() if stage in (DENOISING_STEP, DENOISING_LOOP) else nullcontext()

    try:
        with watch(rung.pipe, enter):
            draw(rung.pipe, rung.requests.square[2])
    except RuntimeError as error:
        if "synchronizing" not in str(error):
            raise
        return True
    return False


def loop_reads_values(rung: Climbed) -> bool:
    """Whether the host reads a tensor's value in the denoising loop of a call, for which it would wait on a GPU."""

    def within(event: FunctionEvent | None) -> Iterator[str]:
        while event is not None:
            yield event.name
            event = event.cpu_parent

    with annotate(rung.pipe), profile(activities=[ProfilerActivity.CPU]) as recorded:
        draw(rung.pipe, rung.requests.square[2])
    items = [set(within(event)) for event in recorded.events() if event.name == "aten::item"]
    on_a_cpu_alone = {"aten::_assert_async", "aten::_scaled_mm"}  # read what a GPU's kernels take from its memory
    return any({DENOISING_STEP, DENOISING_LOOP} & names and not on_a_cpu_alone & names for names in items)


def test_nothing_is_waited_for_in_the_loop(rung: Climbed, waiting_is_an_error: Callable) -> None:
    """But for the scheduler's look for its first step, below the rung that removes it."""
    draw(rung.pipe, rung.requests.square[1])
    on_gpu = rung.device.type == "cuda"
    waits = loop_waits_on_a_gpu(rung, waiting_is_an_error) if on_gpu else loop_reads_values(rung)
    assert waits == (not rung.recipe.scheduler_sync_removal)
