"""What shapes that aren't fixed cost: `python -m benchmark.dynamic_shapes RECIPE --checkpoint tiny --output FILE`.

Each region of the pipeline (export/regions.py) is compiled for every size that is given, and once more for all of them
and what lies between (`python -m export build --dynamic`). Both models are called in turns with the same inputs, at
each size; beside their times stand their errors against the eager module, ||out - eager|| / ||eager||. On a GPU a call
is a replay of a CUDA graph of ten, by ten: what the host takes doesn't count. The interval of the ratio is a 95 %
bootstrap.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree

from utils.quiet import quiet

with quiet():
    import recipes
    from benchmark import series
    from benchmark.device_timing import captured
    from benchmark.packages import packaged
    from export import build, order, regions, sizes
    from export.__main__ import numbers, resolutions
    from export.order import Order
    from export.regions import Inputs
    from export.runtime import BoundModel, Library, PackagedCall
    from utils import command_line, results
    from utils.errors import Parser, UsageError, run_command
    from utils.relative_error import relative_error
    from utils.timing import bootstrap_ratio, summary, timed

FIXED, DYNAMIC = "fixed", "dynamic"
_IN_A_GRAPH = 10
HEADER = "region        sizes                                     fixed ms  dynamic ms  dynamic / fixed, 95 %    errors"


def parser() -> Parser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", metavar="RECIPE", help="as run_benchmark.py's --recipe: fp32,execution=aoti, ...")
    parser.add_argument("--checkpoint", required=True, help="hub id, folder, tiny, or random/flux-...")
    parser.add_argument("--resolutions", required=True, help="HEIGHTxWIDTH in pixels, several with commas")
    parser.add_argument("--text-lengths", required=True, help="T5 tokens, several with commas")
    names = list(regions.REGIONS)
    parser.add_argument("--regions", nargs="+", choices=names, default=names, help="only these of the pipeline")
    parser.add_argument("--batch", type=int, default=1, help="images a call (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=100, help="timed calls of each model (default: %(default)s)")
    parser.add_argument("--device", choices=["auto", "cuda", "cpu"], default="auto", help="auto: cuda if there is one")
    series.add_options(parser, seconds=540)
    return parser


@torch.no_grad()
def measure(library: Library, calls: list[PackagedCall], repeats: int, device: torch.device) -> dict[str, Any]:
    """One region's figures: `at`, one row a size; `calls` are those of the region, of which all differ in size."""
    (fixed, _), (dynamic, _) = library.build(calls), library.build(calls, dynamic=True)
    (of_ranges,) = (name for name, model in dynamic.manifest.models.items() if model.ranges)
    rows = []
    for region, inputs in calls:
        specs = build.input_specs(inputs)
        (of_size,) = (name for name, model in fixed.manifest.models.items() if sizes.refusal(model, specs) is None)
        models = {
            FIXED: library.bound(region, fixed, of_size, inputs),
            DYNAMIC: library.bound(region, dynamic, of_ranges, inputs),
        }
        with region.unpackaged() as module:
            expected = module(**inputs)
        errors = {name: error(model(inputs), expected) for name, model in models.items()}
        ms = in_turns({name: run(model, inputs, device) for name, model in models.items()}, repeats, device)
        figures = {name: summary(of_model) for name, of_model in ms.items()}
        ratio = bootstrap_ratio(ms[DYNAMIC], ms[FIXED])
        rows.append({"sizes": sizes.of(specs), "ms": figures, "ratio": ratio, "relative_error": errors})
    ranges = {name: asdict(one) for name, one in dynamic.manifest.models[of_ranges].ranges.items()}
    return {"ranges": ranges, "at": rows}


def error(outputs: Any, expected: Any) -> float:
    """The largest of a call's outputs."""
    both = zip(pytree.tree_leaves(outputs), pytree.tree_leaves(expected), strict=True)
    return max(relative_error(output, wanted) for output, wanted in both)


def run(model: BoundModel, inputs: Inputs, device: torch.device) -> Callable[[], object]:
    """What is timed: `_IN_A_GRAPH` calls on a GPU, else one."""
    call = partial(model, inputs)
    if device.type != "cuda":
        return call
    return captured([call] * _IN_A_GRAPH).replay


def in_turns(runs: dict[str, Callable[[], object]], repeats: int, device: torch.device) -> dict[str, list[float]]:
    """Milliseconds a call, the runs taking turns, each as often the first; the first ten turns aren't counted."""
    calls = _IN_A_GRAPH if device.type == "cuda" else 1
    ms: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for number in range(10 + repeats):
        for name in names if number % 2 else reversed(names):
            seconds = timed(runs[name], device)
            if number >= 10:
                ms[name].append(1000 * seconds / calls)
    return ms


def line(row: dict[str, Any]) -> str:
    text = [row["region"]]
    for at in row.get("at", ()):
        named = ", ".join(f"{size} {name.replace('_', ' ')}" for name, size in at["sizes"].items())
        ratio, errors = at["ratio"], at["relative_error"]
        text.append(
            f"{'':<12}  {named:<40}  {at['ms'][FIXED]['median']:8.3f}  {at['ms'][DYNAMIC]['median']:10.3f}"
            f"  {ratio['value']:6.3f} ({ratio['low']:.3f} to {ratio['high']:.3f})"
            f"  {errors[FIXED]:.1e} {errors[DYNAMIC]:.1e}"
        )
    return "\n".join(text)


def by_region(calls: list[PackagedCall]) -> dict[str, list[PackagedCall]]:
    found: dict[str, list[PackagedCall]] = {}
    for region, inputs in calls:
        found.setdefault(region.region.name, []).append((region, inputs))
    return found


def benchmark(arguments: argparse.Namespace) -> None:
    device, recipe = command_line.device(arguments), packaged(recipes.parse(arguments.recipe))
    lengths = numbers("text-lengths", arguments.text_lengths)
    size = resolutions(arguments.resolutions)
    if arguments.repeats < 1:
        raise UsageError(f"--repeats {arguments.repeats}: give at least 1")
    wanted = Order(arguments.checkpoint, recipe, size, (arguments.batch,), lengths, dynamic=True)
    requests = wanted.requests()
    results.check_output(arguments.output)
    with tempfile.TemporaryDirectory(prefix="flux-fast-") as folder:
        pipe, library = order.pipeline(arguments.checkpoint, recipe, Path(folder), device)
        measurements = [
            series.Measurement(
                {"region": name, "modules": sum(one.region is regions.REGIONS[name] for one in library.packaged)},
                partial(measure, library, of_region, arguments.repeats, device),
                None if len(of_region) > 1 else "its inputs are the same at all these sizes",
            )
            for name, of_region in by_region(order.called(pipe, library, requests)).items()
            if name in arguments.regions
        ]
        about = {
            "recipe": {"name": recipes.command_line_name(recipe), "hash": recipe.hash, **recipe.to_dict()},
            "checkpoint": arguments.checkpoint,
            "batch": arguments.batch,
            "threads": torch.get_num_threads(),
        }
        series.run("regions", measurements, HEADER, line, arguments, device, about)


def main() -> None:
    arguments = parser().parse_args()
    with torch.inference_mode(False):
        run_command(lambda: benchmark(arguments), arguments.debug)


if __name__ == "__main__":
    main()
