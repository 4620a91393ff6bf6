"""Ahead-of-time packages in figures: `python -m benchmark.packages RECIPE --checkpoint random/flux-dev --output FILE`.

RECIPE has execution=compile or aoti; packages are compared with torch.compile of it. Four parts, each in a fresh
process with empty caches of compiled code (benchmark/package_parts.py says what each figure is):

- build: the package of a size, into an empty folder: seconds, whole and of each model, and bytes;
- text_encoders: the same of theirs, which fits every size, where RECIPE has compiled_text_encoders=true;
- start: from weights in memory until a call can be replayed: packages checked, loaded and bound, CUDA graphs captured,
  the text encoders' too where RECIPE has them from packages;
- steps: times of a step from packages and from torch.compile, whole pipeline calls taking turns, and their ratio; what
  the host takes for a step; the errors of both against the eager modules.

FILE is written anew after each of them. What it holds already of the same recipe, request and machine is kept: with
--packages DIR the parts can be measured one by one, as in `--parts build`, then `--parts start,steps`.

In `build` and `steps` text encoders are as they are, eager and not quantized.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from utils.quiet import quiet

with quiet():
    import recipes
    from benchmark import fresh_process, step_clock
    from benchmark.package_parts import COMPILED, PACKAGES, PARTS, Part
    from benchmark.runner import command_text
    from export.verify import Error
    from recipes.recipe import Recipe
    from utils import command_line, environment, results
    from utils.errors import Parser, UsageError, UserError, run_command


def parser() -> Parser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "recipe", metavar="RECIPE", help="as run_benchmark.py's --recipe: aoti, fused_qkv,attention=..."
    )
    step_clock.add_options(parser, calls=20)
    parser.set_defaults(steps=28)  # longer than the second in which a GPU at its power limit changes its clock
    parser.add_argument("--parts", default=",".join(PARTS), help="with commas between them (default: %(default)s)")
    parser.add_argument("--packages", type=Path, metavar="DIR", help="where the packages lie, and stay afterwards")
    parser.add_argument("--seconds", type=float, default=540, help="begin no further part after that long")
    return parser


def packaged(recipe: Recipe) -> Recipe:
    """`recipe` from packages, a launch for each step, with plain text encoders, whose package is a part of its own.

    Raises:
        UsageError: it is eager.
    """
    if recipe.execution == "eager":
        name = recipes.command_line_name(recipe)
        raise UsageError(
            f"{name} compiles nothing: give a recipe with execution=compile or aoti, as {name},execution=aoti"
        )
    plain = replace(recipe, compiled_text_encoders=False, float8_text_encoder=False, loop_graph=False)
    return replace(plain, execution="aoti")


def parts(arguments: argparse.Namespace) -> list[str]:
    """Those asked for, in their order.

    Raises:
        UsageError: an unknown one, or one that needs packages which aren't built.
    """
    asked = arguments.parts.split(",")
    if unknown := [name for name in asked if name not in PARTS]:
        raise UsageError(f"--parts {arguments.parts}: there is no {unknown[0]!r}, but {', '.join(PARTS)}")
    if "build" not in asked and arguments.packages is None:
        raise UsageError(f"--parts {arguments.parts}: give the folder that `build` filled with --packages DIR")
    if asked == ["text_encoders"] and not _of_text(arguments):
        raise UsageError("--parts text_encoders: for recipes with compiled_text_encoders=true")
    return [name for name in PARTS if name in asked and (name != "text_encoders" or _of_text(arguments))]


def _of_text(arguments: argparse.Namespace) -> bool:
    return recipes.parse(arguments.recipe).compiled_text_encoders


def measure(arguments: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    """The result file's contents, and what went wrong."""
    begun = time.monotonic()
    device = command_line.device(arguments)
    chosen, request = recipes.parse(arguments.recipe), step_clock.request(arguments)
    recipe = packaged(chosen)
    whole = replace(chosen, execution="aoti", loop_graph=False)
    if request.steps < 2:
        raise UsageError(f"--steps {request.steps}: give at least 2, the first one of a call being apart")
    asked = parts(arguments)
    results.check_output(arguments.output)
    recipes.check(recipe, device)
    about = {
        "recipe": {"name": recipes.command_line_name(recipe), "hash": recipe.hash, **recipe.to_dict()},
        "checkpoint": arguments.checkpoint,
        "request": request.to_dict(),
        "environment": environment.capture(device, arguments.commit),
    }
    kept = {
        name: part for name, part in earlier(arguments.output, about).items() if name in PARTS and name not in asked
    }
    results.write(arguments.output, {**about, "command": command_text(), **kept})
    wrong: list[str] = []
    with tempfile.TemporaryDirectory(prefix="flux-fast-") as scratch:
        folder = (arguments.packages or Path(scratch) / "packages").absolute()
        for name in asked:
            spent = time.monotonic() - begun
            if spent > arguments.seconds:
                put(arguments.output, name, skipped=f"no time left of {arguments.seconds:.0f} s")
                wrong.append(f"{name} (no time left)")
                continue
            print(f"{name}: {(PARTS[name].__doc__ or '').splitlines()[0]}", file=sys.stderr, flush=True)
            part = Part(
                name,
                arguments.checkpoint,
                str(device),
                recipe,
                whole,
                request,
                arguments.calls,
                folder,
                arguments.output.absolute(),
                command_text(),
            )
            caches = Path(scratch) / name
            caches.mkdir()
            try:
                fresh_process.run(name, "benchmark.package_parts", part.to_json(), caches, arguments.debug)
            except UserError as error:  # the others are worth their measurement
                put(arguments.output, name, failed=str(error))
                wrong.append(f"{name} ({error})")
    return read(arguments.output), wrong


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def put(path: Path, name: str, **figures: Any) -> None:
    """Add to a part's figures."""
    found = read(path)
    results.write(path, {**found, name: {**found.get(name, {}), **figures}})


def earlier(path: Path, about: dict[str, Any]) -> dict[str, Any]:
    """What the file holds of the same recipe, checkpoint, request, machine and commit; nothing of anything else."""
    try:
        found = read(path)
        return found if {name: found[name] for name in about} == json.loads(json.dumps(about)) else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def table(found: dict[str, Any]) -> str:
    """The figures that are there, in Markdown."""
    rows: list[tuple[str, str]] = []
    for name in PARTS:
        part = found.get(name, {})
        for why in ("failed", "skipped"):
            if why in part:
                rows.append((name, f"{why}: {part[why]}"))
    build, of_text, start, steps = (found.get(name, {}) for name in PARTS)
    for what, built in (("build", build), ("build, text encoders", of_text)):
        if "seconds" in built:
            rows.append((f"{what}, s", f"{built['seconds']:.1f}"))
            rows += [(f"build, {name}, s", f"{seconds:.1f}") for name, seconds in built["of_models"].items()]
            rows.append((f"{built['models']} models, MB", f"{built['bytes'] / 1e6:.2f}"))
    if "seconds" in start:
        first = start["first_call_s"]
        what = "warm-up and capture" if start["captured"] else "first call"
        rows.append(("start, s", f"{start['seconds']:.2f}"))
        rows.append((f"start, {start['bound']} models checked, loaded, bound, s", f"{start['bind_s']:.2f}"))
        rows += [(f"start, {what} of the {name}, s", f"{seconds:.2f}") for name, seconds in first.items()]
    if "step_ms" in steps:
        ratio = steps["step_ms"]["ratio"]
        rows.append(("torch.compile, s", f"{steps['compile_s']:.1f}"))
        rows += [(f"step, {name}, ms", f"{steps['step_ms'][name]['median']:.3f}") for name in (PACKAGES, COMPILED)]
        interval = f"{ratio['value']:.4f} ({ratio['low']:.4f} to {ratio['high']:.4f})"
        rows.append(("step, packages / compiled, 95 %", interval))
    if "host_ms" in steps:
        for name in (PACKAGES, COMPILED):
            host = steps["host_ms"][name]
            rows.append((f"host a step, {name}, ms", f"{host['median']:.3f}"))
            if "in_a_row" in host:
                rows.append((f"host a step, {name}, steps in a row, ms", f"{host['in_a_row']['median']:.3f}"))
    if "relative_error" in steps:
        of_step = steps["relative_error"]["step"]
        rows += [(f"relative error of a step, {name}", f"{error:.2g}") for name, error in of_step.items()]
        for error in steps["relative_error"]["models"]:
            of = Error(**error)
            above = f", above {of.tolerance:.2g}" if of.value > of.tolerance else ""
            if of.over_eager is not None:
                above += f"; to float32 {of.over_eager:.2f} times eager's"
            rows.append((f"relative error, {of.model}", f"{of.value:.2g}{above}"))
    name, request = found["recipe"]["name"], results.size(found["request"])
    head = [f"{name}, {found['checkpoint']}, {request}, {found['environment']['device']}", "", "| | |", "|---|--:|"]
    return "\n".join([*head, *(f"| {what} | {figure} |" for what, figure in rows)])


def main() -> None:
    arguments = parser().parse_args()

    def run() -> None:
        found, wrong = measure(arguments)
        text = table(found)
        results.write_table(arguments.output, text)
        print(text, flush=True)
        if wrong:
            raise UserError(f"not measured: {'; '.join(wrong)}")

    run_command(run, arguments.debug)


if __name__ == "__main__":
    main()
