"""Times of one denoising step, many recipes in one process: `python -m benchmark.step_times RECIPE... --output FILE`.

Quicker and coarser than run_benchmark.py, for comparing optimizations one by one: each recipe draws once to compile and
capture, and then `--calls` times, where each step of the pipeline's own loop, and the VAE's decoder, is timed by
itself: on a GPU by events around its call, so that nothing waits. The first step of a call holds what is hoisted out of
the others; the mean counts it, the median doesn't. Of loop_graph=true, whose steps are one call, each has its share of
the loop's time, and first, median and mean are of these. FILE is written anew after every recipe.

Compile seconds are those of the machine's caches as they lie, and a recipe finds what one before it compiled; with
--cold each one has empty caches of compiled code and builds its own packages (kernels that Triton alone compiled stay
in the process). FILE says which: `cold_caches`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch._inductor.utils import fresh_cache

from utils.quiet import quiet

with quiet():
    import recipes
    from benchmark import prompts, step_clock
    from benchmark.memory import peak_bytes, reset_peak
    from benchmark.runner import command_text
    from benchmark.step_clock import StepClock, latents, numbered
    from export.store import PackageStore
    from recipes.dtype import torch_dtype
    from recipes.recipe import Recipe
    from utils import checkpoints, command_line, environment, results
    from utils.compile_clock import CompileClock
    from utils.errors import Parser, UserError, is_out_of_memory, one_line, run_command
    from utils.files import write_text
    from utils.relative_error import relative_error
    from utils.request import Request
    from utils.timing import summary, synchronize


HEADER = (
    "| recipe | step ms | first | mean | x | VAE ms | compile s | start s | peak GiB | rel. error |\n"
    "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|"
)


@contextmanager
def caches(cold: bool) -> Iterator[PackageStore]:
    """Where the body's packages lie. If `cold`, that and all else that compilers keep on disk is its own, and empty."""
    if not cold:
        yield PackageStore()
        return
    with tempfile.TemporaryDirectory() as scratch, fresh_cache(dir=scratch):
        yield PackageStore(Path(scratch) / "packages")


def measure(
    checkpoint: str, recipe: Recipe, request: Request, calls: int, device: torch.device, packages: PackageStore
) -> tuple[dict[str, Any], torch.Tensor]:
    """Figures of one recipe, and the final latents of `request`, float32 on the CPU."""
    pipe = checkpoints.load(checkpoint, torch_dtype(recipe), device, progress=False)
    pipe.set_progress_bar_config(disable=True)
    clock, decoding = StepClock(device), StepClock(device)
    clock.attach(pipe.transformer)
    decoding.attach(pipe.vae.decoder)

    started = time.perf_counter()
    applied = recipes.apply(pipe, recipe, packages)
    with CompileClock() as compiling:
        numbered(checkpoint, request, prompts.WARM_UP).run(pipe)
        synchronize(device)
    start_s = time.perf_counter() - started
    clock.milliseconds()
    decoding.milliseconds()
    in_call = request.steps if recipe.loop_graph else 1  # steps in a call of the transformer
    reset_peak(device)
    steps: list[float] = []
    for number in range(calls):
        numbered(checkpoint, request, number).run(pipe)
        steps += [call / in_call for call in clock.milliseconds() for _ in range(in_call)]
    peak = peak_bytes(device)
    result = latents(pipe, request).float().cpu()
    firsts, others = steps[:: request.steps], [t for i, t in enumerate(steps) if i % request.steps]
    return {
        "recipe": {"name": recipes.command_line_name(recipe), "hash": recipe.hash, **recipe.to_dict()},
        "applied": applied,
        "lossless": recipes.is_lossless(recipe),
        "step_ms": {**summary(others or firsts), "first": fmean(firsts), "mean": fmean(steps)},
        "vae_decode_ms": summary(decoding.milliseconds()),
        "compile_s": round(compiling.seconds, 3),
        "compile_phases_s": {name: round(seconds, 3) for name, seconds in compiling.phases.items()},
        "start_s": round(start_s, 3),
        "peak_memory_bytes": peak,
    }, result


def parser() -> Parser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "recipes", nargs="+", metavar="RECIPE", help="as run_benchmark.py's --recipe; the first is 1.00"
    )
    step_clock.add_options(parser, calls=2)
    parser.add_argument("--cold", action="store_true", help="empty caches of compiled code for each recipe")
    return parser


def main() -> None:
    arguments = parser().parse_args()

    def run() -> None:
        device = command_line.device(arguments)
        request = step_clock.request(arguments)
        asked = {text: recipes.parse(text) for text in arguments.recipes}
        results.check_output(arguments.output)
        about = {
            "checkpoint": arguments.checkpoint,
            "request": request.to_dict(),
            "calls": arguments.calls,
            "cold_caches": arguments.cold,
            "environment": environment.capture(device, arguments.commit),
            "command": command_text(),
        }
        rows: list[dict[str, Any]] = []
        table = [HEADER]
        reference: torch.Tensor | None = None
        print(HEADER, flush=True)
        for text, recipe in asked.items():
            try:
                recipes.check(recipe, device)
                with caches(arguments.cold) as packages:
                    row, latents = measure(arguments.checkpoint, recipe, request, arguments.calls, device, packages)
            except Exception as error:  # the others are still worth measuring
                if arguments.debug:
                    traceback.print_exc()
                words = "out of memory" if is_out_of_memory(error) else f"{type(error).__name__}: {one_line(error)}"
                row, latents = (
                    {"recipe": {"name": text, "hash": recipe.hash, **recipe.to_dict()}, "failed": words},
                    None,
                )
            if latents is not None:
                reference = latents if reference is None else reference
                row["relative_error_to_first"] = relative_error(latents, reference)
            rows.append(row)
            write_text(arguments.output, json.dumps({**about, "recipes": rows}, indent=1) + "\n")
            table.append(line(text, row, rows))
            results.write_table(arguments.output, "\n".join(table))
            print(table[-1], flush=True)
            torch._dynamo.reset()  # the next recipe compiles for itself, in memory that this one no longer holds
            reset_peak(device)
        if failed := [row["recipe"]["name"] for row in rows if "failed" in row]:
            raise UserError(f"not measured: {'; '.join(failed)}")

    run_command(run, arguments.debug)


def line(text: str, row: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """A row of the table; the ratio is to the first recipe that was measured."""
    if "failed" in row:
        return f"| {text} | failed: {row['failed']} | | | | | | | | |"
    step = row["step_ms"]
    first = next(r for r in rows if "failed" not in r)["step_ms"]["median"]
    figures = [step["median"], step["first"], step["mean"], first / step["median"], row["vae_decode_ms"]["median"]]
    cells = [*(f"{x:.2f}" for x in figures), f"{row['compile_s']:.0f}", f"{row['start_s']:.0f}"]
    cells += [f"{row['peak_memory_bytes'] / 2**30:.2f}", f"{row['relative_error_to_first']:.4f}"]
    return f"| {text} | {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
