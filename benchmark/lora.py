"""LoRA on a running pipeline in figures: `python -m benchmark.lora RECIPE --checkpoint random/flux-dev --output FILE`.

A LoRA is loaded at scale 1, its scale changed to 0.5, and it is removed (export/lora.py), `--runs` times, each timed
with the device idle before and after. It has random values (benchmark/lora_inputs.py), for all attention and
feed-forward Linears: how long it takes depends on their number and shapes alone.

It is an error if meanwhile anything is compiled, if the latents of a call don't change with the LoRA and with its
scale, or if after the removal a weight isn't bit for bit what it was, or lies elsewhere, or the latents differ.
Memory and the bytes read are measured in a run of their own before, whose emptied caches would slow the others; so
the checkpoint's files are in the system's page cache when the timed ones read them, as far as they fit there. A disk
that has to be read takes its time on top.

The weights of random/... are first written to a temporary folder in --scratch (24 GB in bfloat16), which is removed in
the end; that isn't in the figures.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from utils.quiet import quiet

with quiet():
    from diffusers import DiffusionPipeline

    import recipes
    from benchmark import lora_inputs, step_clock
    from benchmark.memory import peak_bytes, reset_peak
    from benchmark.runner import command_text
    from export import lora_file
    from export.lora import Adapter
    from export.store import PackageStore
    from export.weights import exported_tensors, fingerprint
    from recipes.dtype import torch_dtype
    from recipes.recipe import Recipe
    from utils import checkpoints, command_line, environment, results
    from utils.compile_clock import CompileClock
    from utils.errors import Parser, UsageError, UserError, run_command
    from utils.files import check_folder
    from utils.relative_error import relative_error
    from utils.request import Request
    from utils.timing import summary, synchronize, timed

LOAD, SCALE, REMOVE = "load", "scale", "remove"
SCALES = {LOAD: 1.0, SCALE: 0.5}
Figure = TypeVar("Figure")
_HASHING = 8  # threads
_WARM_UP = 2  # calls: with CUDA graphs the second one is a replay already


def parser() -> Parser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", metavar="RECIPE", help="as run_benchmark.py's --recipe: aoti, compiled, ...")
    step_clock.add_request_options(parser)
    parser.add_argument("--runs", type=int, default=3, help="timed runs (default: %(default)s)")
    parser.add_argument("--rank", type=int, default=16, help="the LoRA's (default: %(default)s)")
    parser.add_argument("--packages", type=Path, metavar="DIR", help="where the packages lie, and stay afterwards")
    parser.add_argument("--scratch", type=Path, metavar="DIR", help="for temporary files (default: the system's)")
    parser.add_argument("--seconds", type=float, default=540, help="begin no further run after that long")
    return parser


@dataclass(frozen=True)
class Running:
    """A pipeline that has all it needs compiled, and how it is without a LoRA.

    adapter: with no LoRA loaded. file: of the LoRA that is to be. weights: of each parameter and buffer of the
    transformer, where it lies and the sha256 of its bytes. compilations: so far.
    """

    pipe: DiffusionPipeline
    adapter: Adapter
    file: Path
    request: Request
    device: torch.device
    latents: torch.Tensor
    weights: dict[str, tuple[int, str]]
    compilations: int

    def cycle(self, figure: Callable[[Callable[[], None]], Figure]) -> tuple[dict[str, Figure], list[float]]:
        """Load the LoRA, change its scale and remove it: the `figure` of each, and how far the latents went with it.

        Raises:
            UserError: it isn't as it should be meanwhile or afterwards.
        """
        doing: dict[str, Callable[[], None]] = {
            LOAD: partial(self.adapter.load, self.file, SCALES[LOAD]),
            SCALE: partial(self.adapter.scale, SCALES[SCALE]),
            REMOVE: self.adapter.remove,
        }
        figures: dict[str, Figure] = {}
        seen = [self.latents]
        for name in (LOAD, SCALE):
            figures[name] = figure(doing[name])
            seen.append(step_clock.latents(self.pipe, self.request))
            if not seen[-1].isfinite().all():
                raise UserError(f"with the LoRA at scale {SCALES[name]:g} the latents aren't finite")
            if any(torch.equal(seen[-1], earlier) for earlier in seen[:-1]):
                raise UserError(f"the LoRA at scale {SCALES[name]:g} has no effect: the latents are those of before")
        figures[REMOVE] = figure(doing[REMOVE])
        self._check_restored()
        return figures, [relative_error(latents, self.latents) for latents in seen[1:]]

    def _check_restored(self) -> None:
        now = snapshot(self.pipe)
        if now.keys() != self.weights.keys():
            raise UserError(f"after the removal there are other weights: {min(now.keys() ^ self.weights.keys())}")
        for what, which in (("lies elsewhere than", 0), ("is not, bit for bit, as", 1)):
            others = [name for name, weight in self.weights.items() if now[name][which] != weight[which]]
            if others:
                count = f"{len(others)} of {len(now)} weights"
                raise UserError(f"after the removal {others[0]} {what} before the LoRA ({count})")
        if not torch.equal(step_clock.latents(self.pipe, self.request), self.latents):
            raise UserError("after the removal the latents differ from those before the LoRA, though no weight does")


def snapshot(pipe: DiffusionPipeline) -> dict[str, tuple[int, str]]:
    """Of each of the transformer's parameters and buffers, quantized values and scales apart, address and sha256."""

    def of_one(name: str, tensor: torch.Tensor) -> tuple[int, str]:
        return tensor.data_ptr(), fingerprint({name: tensor})

    tensors = exported_tensors(pipe.transformer)
    with ThreadPoolExecutor(_HASHING) as threads:  # one alone hashes 1 to 2 GB a second
        return dict(zip(tensors, threads.map(of_one, tensors, tensors.values()), strict=True))


def start(
    arguments: argparse.Namespace, recipe: Recipe, request: Request, device: torch.device, scratch: Path
) -> Running:
    """The pipeline, called until nothing is new to it, and a LoRA's file in `scratch`.

    Raises:
        UserError: there is too little room on the disk, or two calls with the same arguments don't come to the same.
    """
    source = arguments.checkpoint
    if checkpoints.is_random(source):
        lora_inputs.check_disk(source, torch_dtype(recipe), scratch)
    pipe = checkpoints.load(source, torch_dtype(recipe), device, progress=False)
    pipe.set_progress_bar_config(disable=True)
    file = lora_inputs.write_lora(pipe.transformer, arguments.rank, scratch / "lora")
    if checkpoints.is_random(source):
        report(f"writing the weights of {source} to {scratch}")
        source = str(scratch / "checkpoint")
        lora_inputs.write_checkpoint(pipe, Path(source))
    recipes.apply(pipe, recipe, PackageStore(arguments.packages or scratch / "packages"))
    with CompileClock(progress=True) as clock:
        for _ in range(_WARM_UP):
            before = step_clock.latents(pipe, request)
        latents = step_clock.latents(pipe, request)
    if not torch.equal(before, latents):
        raise UserError("without a LoRA, two calls with the same arguments end in different latents already")
    adapter = Adapter(pipe, source)
    return Running(pipe, adapter, file, request, device, latents, snapshot(pipe), clock.compilations)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """The result file's contents.

    Raises:
        UsageError: an option is wrong.
        UserError: as `start`'s, or what is timed doesn't do what it should.
    """
    begun = time.monotonic()
    device = command_line.device(arguments)
    recipe, request = recipes.parse(arguments.recipe), step_clock.requested(arguments)
    for name in ("runs", "rank"):
        if getattr(arguments, name) < 1:
            raise UsageError(f"--{name} {getattr(arguments, name)}: give at least 1")
    results.check_output(arguments.output)
    if arguments.scratch is not None:
        check_folder(arguments.scratch / "checkpoint")
    recipes.check(recipe, device)
    machine = environment.capture(device, arguments.commit)
    with tempfile.TemporaryDirectory(prefix="flux-fast-", dir=arguments.scratch) as name:
        running = start(arguments, recipe, request, device, Path(name))
        runs: list[dict[str, float]] = []
        with CompileClock() as meanwhile:
            report("a first run, for memory and the bytes read")
            sizes, effects = running.cycle(partial(bytes_of, running))
            while len(runs) < arguments.runs and (not runs or time.monotonic() - begun <= arguments.seconds):
                seconds, _ = running.cycle(partial(timed, device=device))
                runs.append(seconds)
                report(", ".join(f"{name} {of_one:.2f} s" for name, of_one in seconds.items()))
        if meanwhile.compilations:
            raise UserError(
                f"{meanwhile.compilations} graphs were compiled while the LoRA came and went, which it should spare"
            )
        if len(runs) < arguments.runs:
            report(f"no time left of {arguments.seconds:.0f} s: {len(runs)} runs instead of {arguments.runs}")
        layers = len(lora_file.read(running.file).layers)
        lora_bytes = running.file.stat().st_size
    return {
        "recipe": {"name": recipes.command_line_name(recipe), "hash": recipe.hash, **recipe.to_dict()},
        "checkpoint": arguments.checkpoint,
        "request": request.to_dict(),
        "environment": {**machine, "after": environment.device_state(device)},
        "command": command_text(),
        "lora": {
            "values": "random",
            "seed": lora_inputs.SEED,
            "relative_norm": lora_inputs.CHANGE,
            "rank": arguments.rank,
            "layers": layers,
            "bytes": lora_bytes,
            "scales": SCALES,
        },
        "seconds": {name: {**summary(of_one := [run[name] for run in runs]), "runs": of_one} for name in runs[0]},
        "bytes": sizes,
        "compilations": {"before": running.compilations, "meanwhile": meanwhile.compilations},
        "latents_relative_change": dict(zip(SCALES, effects, strict=True)),
        "weights_restored": len(running.weights),
    }


def bytes_of(running: Running, do: Callable[[], None]) -> dict[str, int]:
    """Read: of the checkpoint's tensors. at_rest, peak: of the device's memory, before and meanwhile."""
    read = running.adapter.bytes_read
    reset_peak(running.device)
    at_rest = peak_bytes(running.device)
    do()
    synchronize(running.device)
    return {"read": running.adapter.bytes_read - read, "at_rest": at_rest, "peak": peak_bytes(running.device)}


def table(found: dict[str, Any]) -> str:
    """The figures in Markdown."""
    lora, compilations = found["lora"], found["compilations"]
    what = f"LoRA of random values, rank {lora['rank']}, {lora['layers']} layers, {lora['bytes'] / 1e6:.1f} MB"
    request = results.size(found["request"])
    head = f"{found['recipe']['name']}, {found['checkpoint']}, {request}, {found['environment']['device']}; {what}"
    lines = [head, "", "| | load | change of scale | removal |", "|---|--:|--:|--:|"]

    def row(name: str, cells: list[str]) -> None:
        lines.append(f"| {name} | {' | '.join(cells)} |")

    row("s", [f"{of_one['median']:.3f}" for of_one in found["seconds"].values()])
    row("read of the checkpoint, GB", [f"{of_one['read'] / 1e9:.3f}" for of_one in found["bytes"].values()])
    row("memory at rest, GB", [f"{of_one['at_rest'] / 1e9:.3f}" for of_one in found["bytes"].values()])
    row("peak memory, GB", [f"{of_one['peak'] / 1e9:.3f}" for of_one in found["bytes"].values()])
    row("relative change of the latents", [*(f"{x:.2g}" for x in found["latents_relative_change"].values()), "0"])
    restored = f"{found['weights_restored']} weights restored bit for bit"
    lines += ["", f"Compiled before: {compilations['before']}; meanwhile: {compilations['meanwhile']}. {restored}."]
    return "\n".join(lines)


def report(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main() -> None:
    arguments = parser().parse_args()

    def run() -> None:
        found = measure(arguments)
        results.write(arguments.output, found)
        text = table(found)
        results.write_table(arguments.output, text)
        print(text, flush=True)

    run_command(run, arguments.debug)


if __name__ == "__main__":
    main()
