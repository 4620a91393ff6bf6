"""The parts of benchmark.packages, each in a fresh process: `python -m benchmark.package_parts PART`.

A part adds its figures to the result file as soon as it has them.
"""

from __future__ import annotations

import copy
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import chain
from pathlib import Path
from random import Random
from statistics import fmean, median
from typing import Any

import torch
from torch import nn

from utils.quiet import quiet

with quiet():
    from diffusers import DiffusionPipeline

    import recipes
    from benchmark import prompts
    from benchmark.fresh_process import Argument
    from benchmark.step_clock import StepClock, latents, numbered
    from export import order, regions, verify
    from export.order import Order
    from export.runtime import Library, library_of, without_graph
    from export.store import Entry, PackageStore
    from recipes.dtype import torch_dtype
    from recipes.recipe import Recipe
    from utils import checkpoints, environment, ranges, results
    from utils.compile_clock import CompileClock
    from utils.errors import UserError, run_command
    from utils.relative_error import relative_error
    from utils.request import Request
    from utils.timing import StageTimer, bootstrap_ratio, summary, synchronize, timed

PACKAGES, COMPILED = "packages", "compiled"
_HOST_CALLS = 3
_IN_A_ROW = 8  # steps: an H200 took 9 graphs of dev's before the host had to wait


@dataclass(frozen=True)
class Part(Argument):
    """What a fresh process measures. recipe: with execution=aoti, and plain text encoders; whole: the same with those
    that the recipe asked for has; folder: of the packages; output: the result file.

    command: what the user typed, for the record.
    """

    name: str
    checkpoint: str
    device: str
    recipe: Recipe
    whole: Recipe
    request: Request
    calls: int
    folder: Path
    output: Path
    command: str

    def save(self, **figures: Any) -> None:
        """Add figures of this part to the result file."""
        found = json.loads(self.output.read_text())
        about = {"device_state": environment.device_state(torch.device(self.device)), "command": self.command}
        results.write(self.output, {**found, self.name: {**found.get(self.name, {}), **figures, **about}})

    def load(self) -> DiffusionPipeline:
        pipe = checkpoints.load(self.checkpoint, torch_dtype(self.recipe), torch.device(self.device), progress=False)
        pipe.set_progress_bar_config(disable=True)
        return pipe


def build(part: Part) -> None:
    """One package with every model that an image of the request's size needs, into an empty folder, with empty caches.

    seconds: from the regions' calls to the file that lies there whole. of_models: those of export and compiler alone;
    what C++ compilers, which run beside, have left to do when the last model is prepared, is in its.

    Raises:
        UserError: the package was there.
    """
    _build(part, part.recipe, of_text=False)


def text_encoders(part: Part) -> None:
    """One package with the text encoders' layers, which fits every size, into the same folder, with empty caches.

    As `build`.
    """
    _build(part, part.whole, of_text=True)


def _build(part: Part, recipe: Recipe, of_text: bool) -> None:
    request, device = part.request, torch.device(part.device)
    size = ((request.height, request.width),)
    ordered = Order(part.checkpoint, recipe, size, (request.batch,), (request.max_sequence_length,))
    pipe, library = order.pipeline(part.checkpoint, recipe, part.folder, device)
    calls = order.apart(order.called(pipe, library, ordered.requests()))[of_text]
    with CompileClock(progress=True) as clock:
        started = time.perf_counter()
        entry, was_there = library.build(calls)
        seconds = time.perf_counter() - started
    if was_there:
        raise UserError(f"{entry.path} was there before it was to be built: give --packages an empty folder")
    files = (entry.path, entry.path.with_suffix(".json"))
    part.save(
        seconds=round(seconds, 3),
        of_models={name.split(" ")[0]: round(of_one, 3) for name, of_one in clock.named.items()},
        models=len(entry.manifest.models),
        files={file.name: file.stat().st_size for file in files},
        bytes=sum(file.stat().st_size for file in files),
    )


def start(part: Part) -> None:
    """From weights in memory until a step can be replayed, in a process in which nothing was loaded before.

    apply_s: the recipe's work on the weights (fused, quantized), which is none of the packages'. bind_s: packages
    found, checked and loaded, weights bound, for every module. first_call_s: what the first call of the text encoders,
    of a denoising step and of the decoder takes longer than the second: with cuda_graph the warm-up calls and the
    capture, and in any case what the device loads at first use. seconds: bind_s and first_call_s.

    Raises:
        UserError: something was compiled, or bound later.
    """
    device = torch.device(part.device)
    pipe = part.load()
    store = PackageStore(part.folder, build=False)
    apply_s = timed(lambda: recipes.apply(pipe, part.whole, store), device)
    library = library_of(pipe)
    request = replace(part.request, steps=2)
    calls: list[dict[str, list[float]]] = []
    with CompileClock() as clock:
        bind_s = timed(bind_all(library), device)
        models = bound(library)
        for number in range(2):
            timer = StageTimer(device)
            with ranges.watch(pipe, timer.range):
                numbered(part.checkpoint, request, number).run(pipe)
            calls.append(timer.seconds)
    if clock.compilations:
        raise UserError(f"{clock.compilations} graphs were compiled at the start, which packages should spare")
    if bound(library) != models:
        raise UserError(f"the pipeline called {bound(library) - models} models that the packages were not read for")
    stages = {"text_encoders": "prompt_encoding", "transformer": "denoising_step", "vae_decoder": "decoding"}
    firsts = {name: calls[0][stage][0] - calls[1][stage][0] for name, stage in stages.items()}
    part.save(
        seconds=round(bind_s + sum(firsts.values()), 3),
        bind_s=round(bind_s, 3),
        first_call_s={name: round(seconds, 3) for name, seconds in firsts.items()},
        captured=part.whole.cuda_graph,
        bound=models,
        apply_s=round(apply_s, 3),
    )


def bind_all(library: Library) -> Callable[[], None]:
    """Binds each model that fits to every module that it stands in for, as the first call would."""
    device = library.pipe.transformer.device
    models = [model for entry in fitting(library) for model in entry.manifest.models.values()]
    kinds = [(model.region, verify.random_inputs(model.inputs, device)) for model in models]

    def bind() -> None:
        for region, inputs in kinds:
            for packaged in library.packaged:
                if packaged.region.name == region:
                    packaged.bound[regions.key(inputs)] = library.bind(packaged, inputs)

    return bind


def bound(library: Library) -> int:
    """How many models have a module's weights."""
    return sum(len(packaged.bound) for packaged in library.packaged)


def fitting(library: Library) -> list[Entry]:
    """The packages that the pipeline can run.

    Raises:
        UserError: there is none.
    """
    components = {packaged.region.name: packaged.region.component for packaged in library.packaged}

    def fits(entry: Entry) -> bool:
        names = {model.region for model in entry.manifest.models.values()}
        return names <= components.keys() and not any(
            entry.manifest.identity.refusal(library.identity, components[name]) for name in names
        )

    found = [entry for entry in library.store.entries() if fits(entry)]
    if not found:
        raise UserError(f"no package in {library.store.folder} fits this recipe here: measure the part `build` first")
    return found


def steps(part: Part) -> None:
    """Packages against torch.compile of the same recipe, in one process, over the same weights; and their errors."""
    device = torch.device(part.device)
    pipe = part.load()
    pipes = {PACKAGES: pipe, COMPILED: sharing_weights(pipe)}
    chosen = {PACKAGES: part.recipe, COMPILED: replace(part.recipe, execution="compile")}
    clocks = {name: StepClock(device) for name in pipes}
    compile_s = {}
    for name, one in pipes.items():
        clocks[name].attach(one.transformer)
        recipes.apply(one, chosen[name], PackageStore(part.folder, build=False))
        with CompileClock(progress=True) as compiling:
            for number in range(2):
                latents(one, numbered(part.checkpoint, part.request, prompts.WARM_UP + number))
            synchronize(device)
        compile_s[name] = round(compiling.seconds, 3)
    library = library_of(pipe)
    if compile_s[PACKAGES]:
        raise UserError("the packages' pipeline compiled something, which packages should spare")
    part.save(compile_s=compile_s[COMPILED], step_ms=step_ms(part, pipes, clocks))
    part.save(host_ms=host_ms(part, pipes, device))
    part.save(relative_error={"step": step_errors(part, pipes), "models": model_errors(library)})


def sharing_weights(pipe: DiffusionPipeline) -> DiffusionPipeline:
    """A second pipeline, to be optimized for itself: its transformer, VAE and scheduler are copies, the rest is shared.

    The transformer's copy has the same weights at the same place; what a recipe makes of them (fused, quantized) each
    pipeline makes for itself.
    """
    # As parameters of their own: a recipe that moves the one's leaves the other's.
    shared = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in pipe.transformer.parameters()}
    copies = {
        "transformer": copy.deepcopy(pipe.transformer, shared),
        "vae": copy.deepcopy(pipe.vae),
        "scheduler": copy.deepcopy(pipe.scheduler),
    }
    other = type(pipe)(**{**pipe.components, **copies})
    other.set_progress_bar_config(disable=True)
    return other


def step_ms(part: Part, pipes: dict[str, DiffusionPipeline], clocks: dict[str, StepClock]) -> dict[str, Any]:
    """Milliseconds of a step, the two pipelines' calls taking turns; the first step of a call apart.

    A step's neighbours are like it, so what the interval of the ratio is drawn from are the calls' medians. Who begins
    is drawn for each turn: a GPU at its power limit changes its clock about once a second, and always the same order
    would beat with that, as short calls do.
    """
    firsts: dict[str, list[float]] = {name: [] for name in pipes}
    calls: dict[str, list[list[float]]] = {name: [] for name in pipes}
    for clock in clocks.values():
        clock.milliseconds()  # of the warm-up
    draw = Random(0)
    for number in range(part.calls):
        for name in draw.sample([*pipes], len(pipes)):
            latents(pipes[name], numbered(part.checkpoint, part.request, number))
            first, *others = clocks[name].milliseconds()
            firsts[name].append(first)
            calls[name].append(others)
    medians = {name: [median(call) for call in of_pipe] for name, of_pipe in calls.items()}
    figures: dict[str, Any] = {
        name: {**summary([*chain(*calls[name])]), "first": fmean(firsts[name]), "medians_of_calls": medians[name]}
        for name in pipes
    }
    return {**figures, "ratio": bootstrap_ratio(medians[PACKAGES], medians[COMPILED])}


@dataclass
class HostTimer:
    """Seconds that the host takes for a denoising step.

    empty: wait, outside the time, until the device has done all before it; else before a call's first step alone.
    """

    device: torch.device
    empty: bool
    seconds: list[float] = field(default_factory=list)

    @contextmanager
    def range(self, stage: str) -> Iterator[None]:
        if stage != "denoising_step":
            yield
            return
        if self.empty or not self.seconds:
            synchronize(self.device)
        started = time.perf_counter()
        yield
        self.seconds.append(time.perf_counter() - started)


def host_ms(part: Part, pipes: dict[str, DiffusionPipeline], device: torch.device) -> dict[str, Any]:
    """Milliseconds of the host for one step of the loop, from the end of the scheduler's step before to its own end.

    That is the time to launch all of a step's work: the transformer's call, the scheduler's step and the pipeline's
    Python around them. Before each step the device is waited for, outside the time, so that the launch queue is empty
    and the host is never held up by a full one; after it nothing is waited for, unless the loop itself waits. Beside
    it, as `in_a_row`, without that: as a loop runs until its queue is full, in calls of `_IN_A_ROW` steps. Without the
    first step of a call, which also holds what is hoisted out of the others.
    """

    def of(pipe: DiffusionPipeline, empty: bool) -> dict[str, float]:
        steps = part.request.steps if empty else min(part.request.steps, _IN_A_ROW)
        milliseconds: list[float] = []
        for number in range(_HOST_CALLS):
            timer = HostTimer(device, empty)
            with ranges.watch(pipe, timer.range):
                latents(pipe, numbered(part.checkpoint, replace(part.request, steps=steps), number))
            milliseconds += [1000 * seconds for seconds in timer.seconds[1:]]
        return summary(milliseconds)

    return {name: {**of(pipe, empty=True), "in_a_row": of(pipe, empty=False)} for name, pipe in pipes.items()}


@torch.no_grad()
def step_errors(part: Part, pipes: dict[str, DiffusionPipeline]) -> dict[str, float]:
    """||out - eager|| / ||eager|| of each pipeline's step, for the inputs of a request's second one.

    Eager are the packages' own modules, with the recipe's weights: what differs is only how they run.
    """
    transformer = pipes[PACKAGES].transformer
    inputs = _second_call(pipes[PACKAGES], part.request)
    with library_of(pipes[PACKAGES]).recording():
        expected = without_graph(transformer)(**inputs)[0]
    errors = {}
    for name, pipe in pipes.items():
        out = pipe.transformer.forward(**inputs)[0]
        errors[name] = relative_error(out, expected)
    return errors


def _second_call(pipe: DiffusionPipeline, request: Request) -> dict[str, Any]:
    """What the transformer's forward is called with in the second step, after what is hoisted was put in."""
    seen: list[dict[str, Any]] = []

    def see(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        assert not args, "diffusers' Flux pipelines name all arguments"
        seen.append({name: x.clone() if isinstance(x, torch.Tensor) else x for name, x in kwargs.items()})

    hook = pipe.transformer.register_forward_pre_hook(see, with_kwargs=True)
    try:
        latents(pipe, replace(request, steps=2))
    finally:
        hook.remove()
    return seen[1]


def model_errors(library: Library) -> list[dict[str, Any]]:
    """Each model against the modules that it stands in for, on random inputs; the largest error."""
    return [asdict(error) for entry in fitting(library) for error in verify.verify(entry, library)]


PARTS: dict[str, Callable[[Part], None]] = {
    "build": build,
    "text_encoders": text_encoders,
    "start": start,
    "steps": steps,
}


def main() -> None:
    part = Part.from_json(sys.argv[1])
    PARTS[part.name](part)


if __name__ == "__main__":
    run_command(main, debug="--debug" in sys.argv)
