"""The ladder in pictures: a waterfall of latencies, and what each rung drew."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from PIL import Image

from recipes.ladder import NOT_INHERITED
from utils import results
from utils.checkpoints import is_random

_KEPT, _GAIN, _LOSS, _SKIPPED = "#4c78a8", "#54a24b", "#e45756", "#9a9a9a"
_FROM_FIRST = 0.02  # of the axis, between a bar and its figures


def waterfall(rungs: list[dict[str, Any]], path: Path) -> None:
    """Seconds a call by rung: a bar each, what it gained (green) or lost (red) against its parent beside it.

    Where that wasn't measured, against the last one before it that was, and that later ones inherit.
    """
    figure = Figure(figsize=(9, 0.42 * len(rungs) + 1.5), layout="constrained")
    axes = figure.subplots()
    medians = {r["recipe"]["name"]: r["latency_s"]["median"] for r in rungs if "skipped" not in r}
    longest = max(medians.values())
    for_who_asks = {change.__name__ for change in NOT_INHERITED}
    last: float | None = None
    for row, rung in enumerate(rungs):
        name, parent = rung["recipe"]["name"], rung["recipe"]["parent"]
        if name not in medians:
            axes.text(
                _FROM_FIRST * longest, row, f"skipped: {rung['skipped']}", va="center", fontsize=8, color=_SKIPPED
            )
            continue
        now = medians[name]
        before = medians.get(parent, now if last is None else last)
        last = last if name in for_who_asks else now
        axes.barh(row, min(now, before), color=_KEPT, height=0.7)
        axes.barh(row, abs(before - now), left=min(now, before), color=_GAIN if now < before else _LOSS, height=0.7)
        ratio = rung["ratio_to_baseline"]
        words = f"{now:.3f} s" + (f"   {ratio['value']:.2f}x" if ratio else "")
        axes.text(max(now, before) + _FROM_FIRST * longest, row, words, va="center", fontsize=9)
    axes.set_yticks(range(len(rungs)), [r["recipe"]["name"] for r in rungs])
    axes.set_xlim(0, 1.25 * longest)
    axes.set_ylim(-0.7, len(rungs) - 0.3)
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("seconds a call (median); green: gained on the rung it stands on, red: lost")
    axes.set_title(_title(rungs), fontsize=10)
    # A fixed date and salt: the same results give the same file.
    metadata = {"Date": None} if path.suffix == ".svg" else None
    with _fixed_svg_ids():
        figure.savefig(path, dpi=150, metadata=metadata)


def image_strip(rungs: list[dict[str, Any]], folder: Path, path: Path) -> None:
    """What each measured rung drew of the same prompt and seed, side by side; a place is left for a lost picture."""
    drawn = [r for r in rungs if "skipped" not in r]
    columns = min(6, len(drawn))
    rows = -(-len(drawn) // columns)
    figure = Figure(figsize=(1.9 * columns, 2.2 * rows + 0.5), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flat
    for panel in panels:
        panel.axis("off")
    for panel, rung in zip(figure.axes, drawn, strict=False):
        name = rung["recipe"]["name"]
        picture = folder / Path(results.file_name(name, rung["request"])).with_suffix(".png").name
        panel.set_title(name, fontsize=8)
        if not picture.exists():
            panel.set_box_aspect(1)
            panel.text(0.5, 0.5, "not kept", ha="center", va="center", fontsize=8, color="gray")
            continue
        with Image.open(picture) as image:
            # Noise packs well as squares, and not blurred into each other.
            panel.imshow(image.convert("RGB"), interpolation="nearest" if is_random(rung["checkpoint"]) else None)
    title = f"{_title(rungs)}, “{drawn[0]['request']['prompt']}”"
    figure.suptitle(textwrap.fill(title, 24 * columns), fontsize=9)
    figure.savefig(path, dpi=120)


def _title(rungs: list[dict[str, Any]]) -> str:
    first = next(r for r in rungs if "skipped" not in r)
    random = ", random weights" if is_random(first["checkpoint"]) else ""
    request = first["request"]
    size = f"{request['height']}x{request['width']}, {request['steps']} steps, batch {request['batch']}"
    return f"{first['checkpoint']}{random}, {size}"


def _fixed_svg_ids():
    import matplotlib

    return matplotlib.rc_context({"svg.hashsalt": "flux-fast"})
