"""Tables and pictures from result files, and from nothing else: `python -m benchmark.report`.

In each folder of results: `ladder.md`, with a table for each size (height, width, batch, steps) at which rungs were
measured; of the size with the most rungs `ladder.svg`, `ladder.png` (a waterfall of the rungs) and `images.png`, of the
others the same named `ladder@512x512-b4-s28.svg` and so on. In README the tables between its markers
`<!-- results: MACHINE/CHECKPOINT -->`, or with a size, `MACHINE/CHECKPOINT@SIZE`, and `<!-- end of results -->`.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from utils.quiet import quiet

with quiet():
    from benchmark.runner import ONCE
    from recipes import LADDER
    from recipes.ladder import climb, description
    from recipes.recipe import Recipe
    from utils import results
    from utils.checkpoints import is_random
    from utils.errors import UserError, run_command
    from utils.files import ROOT, replacing, write_text

README = ROOT / "README.md"
_BLOCK = re.compile(r"(<!-- results: (\S+) -->\n).*?(<!-- end of results -->)", re.DOTALL)
_RUNGS = [change.__name__ for change in LADDER]


def load(folder: Path, size: str | None = None) -> list[dict[str, Any]]:
    """A folder's ladder: the results of its rungs at `size` (see `results.size`), or at the first of `sizes`."""
    rungs = _rungs(folder)
    size = size or next(iter(_sizes(rungs)), None)
    of_size = [r for r in rungs if results.size(r["request"]) == size]
    return sorted(of_size, key=lambda r: _RUNGS.index(r["recipe"]["name"]))


def sizes(folder: Path) -> list[str]:
    """The sizes at which a folder's rungs were measured, the one with the most of them first."""
    return _sizes([r for r in _rungs(folder) if "skipped" not in r])


def _rungs(folder: Path) -> list[dict[str, Any]]:
    return [r for r in map(results.read, results.files(folder)) if r["recipe"]["name"] in _RUNGS]


def _sizes(rungs: list[dict[str, Any]]) -> list[str]:
    measured = Counter(results.size(r["request"]) for r in rungs)
    return sorted(measured, key=lambda size: (-measured[size], size))


def table(rungs: list[dict[str, Any]]) -> str:
    """The ablation table in Markdown.

    Raises:
        UserError: none of the rungs was measured.
    """
    first = next((r for r in rungs if "skipped" not in r), None)
    if first is None:
        raise UserError("no rung was measured: run `python run_benchmark.py --ladder` first")
    lines = [
        caption(first),
        "",
        "| rung | what it changes | s / call | speed-up, 95 % | step ms | VAE ms | compile s | peak GiB | PSNR dB | |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|---|",
    ]
    of_before = _of_before(rungs)
    for rung in rungs:
        name, what = rung["recipe"]["name"], description(rung["recipe"]["name"])
        if "skipped" in rung:
            reason = rung["skipped"].replace("|", r"\|")
            lines.append(f"| {name} | {what} | | | | | | | | skipped: {reason} |")
        else:
            mark = " †" if name in of_before else ""
            lines.append(f"| {name}{mark} | {what} | " + " | ".join(cell(rung) for cell in _CELLS) + " |")
    if any("skipped" not in rung and _baseline_timed_once(rung) for rung in rungs):
        lines += ["", r"\* The ladder was stopped before its baseline was timed a second time."]
    for differences in sorted(set(of_before.values())):
        names = ", ".join(name for name, its in of_before.items() if its == differences)
        lines += ["", f"† Measured when these rungs still had {differences}: {names}."]
    return "\n".join(lines) + "\n"


def _of_before(rungs: list[dict[str, Any]]) -> dict[str, str]:
    """The measured rungs whose recipe is another one now that the ladder has changed, and in what theirs differs.

    Not in a field that a rung changes which isn't among `rungs`: there it isn't known whether it could run. A field
    that a recipe lacks came later, and had its default.
    """
    skipped = {r["recipe"]["name"]: "skipped" in r for r in rungs}
    now: dict[str, Recipe] = {}
    unknown: list[str] = []
    for rung in climb(lambda rung: "not here" if skipped.get(rung.name) else None):
        now[rung.name] = rung.recipe
        if rung.name not in skipped and rung.inherited:
            unknown += rung.recipe.differences(now[rung.parent] if rung.parent else Recipe())
    found = {}
    for then in ({**Recipe().to_dict(), **r["recipe"]} for r in rungs if "skipped" not in r):
        fields = {name: value for name, value in now[then["name"]].to_dict().items() if name not in unknown}
        differences = [f"{name}={json.dumps(then[name])}" for name, value in fields.items() if then[name] != value]
        if differences:
            found[then["name"]] = ", ".join(differences)
    return found


def _baseline_timed_once(r: dict[str, Any]) -> bool:
    return bool(r["ratio_to_baseline"]) and r["ratio_to_baseline"].get("baseline_timed") == ONCE


def _ratio(r: dict[str, Any]) -> str:
    ratio = r["ratio_to_baseline"]
    once = r"\*" if _baseline_timed_once(r) else ""
    return f"{ratio['value']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f}){once}" if ratio else ""


def _psnr(r: dict[str, Any]) -> str:
    difference = r["image_difference"]
    return "equal" if difference["max_abs"] == 0 else f"{difference['psnr_db']:.1f}"


_CELLS: tuple[Callable[[dict[str, Any]], str], ...] = (
    lambda r: f"{r['latency_s']['median']:.3f}",
    _ratio,
    lambda r: f"{r['denoise_step_ms']['median']:.1f}",
    lambda r: f"{r['stages_ms']['vae_decode']:.1f}",
    lambda r: f"{r['compile_s']:.0f}" if r["compile_s"] else "",
    lambda r: f"{r['peak_memory_bytes']['run'] / 2**30:.2f}",
    _psnr,
    lambda r: "" if r["lossless"] else "lossy",
)


def caption(result: dict[str, Any]) -> str:
    """What the figures are of."""
    request, machine = result["request"], result["environment"]
    weights = (
        " (random weights: times only, nothing is said of image quality)" if is_random(result["checkpoint"]) else ""
    )
    return (
        f"`{result['checkpoint']}`{weights}, {request['width']}x{request['height']}, {request['steps']} steps, "
        f"batch {request['batch']}, on {machine['device']}, {machine['cores']} cores, torch {machine['torch']}, "
        f"median of {len(result['latency_s']['runs'])} runs."
    )


def one_line(result: dict[str, Any]) -> str:
    """A single measurement for the terminal."""
    latency, step = result["latency_s"], result["denoise_step_ms"]
    return (
        f"{result['recipe']['name']}: {latency['median']:.3f} s a call (p10 {latency['p10']:.3f}, "
        f"p90 {latency['p90']:.3f}), {step['median']:.1f} ms a step, applied in {result['apply_s']:.0f} s, "
        f"compiled in {result['compile_s']:.0f} s"
    )


def write_folder(folder: Path) -> str:
    """All of a folder's tables and pictures; returns the tables.

    Raises:
        UserError: none of its rungs was measured.
    """
    from benchmark import plots  # matplotlib: only where something is drawn

    text = tables(folder)
    write_text(folder / "ladder.md", text)
    for number, size in enumerate(sizes(folder)):
        rungs, name = load(folder, size), f"@{size}" if number else ""
        for suffix in ("svg", "png"):
            with replacing(folder / f"ladder{name}.{suffix}") as temporary:
                plots.waterfall(rungs, temporary)
        with replacing(folder / f"images{name}.png") as temporary:
            plots.image_strip(rungs, folder, temporary)
    if folder.is_relative_to(results.RESULTS):
        write_text(README, with_tables(README.read_text(), folder))
    return text


def tables(folder: Path) -> str:
    """A folder's tables, one for each size.

    Raises:
        UserError: none of its rungs was measured.
    """
    return "\n".join(table(load(folder, size)) for size in sizes(folder)) or table([])


def with_tables(readme: str, folder: Path | None = None) -> str:
    """README's text with the tables between its markers made anew; only those of one folder, if it is given."""

    def block(match: re.Match) -> str:
        name, _, size = match[2].partition("@")
        of = results.RESULTS / name
        if folder not in (None, of):
            return match[0]
        return match[1] + "\n" + table(load(of, size or None)) + "\n" + match[3]

    return _BLOCK.sub(block, readme)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    for folder in sorted(path for path in results.RESULTS.glob("*/*") if path.is_dir()):
        if sizes(folder):
            write_folder(folder)
            print(f"{folder.relative_to(ROOT)}: {len(load(folder))} rungs, tables and pictures written", flush=True)


if __name__ == "__main__":
    run_command(main, debug=False)
