"""A series whose measurements are recipes, given on the command line and compared with those measured first."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

import recipes
from benchmark import series
from benchmark.memory import reset_peak
from recipes.recipe import Recipe
from utils import checkpoints, command_line, results
from utils.checkpoints import Defaults
from utils.errors import UsageError, UserError


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipes", nargs="*", metavar="RECIPE", help="as run_benchmark.py's --recipe")
    parser.add_argument("--checkpoint", default="tiny")
    parser.add_argument("--steps", type=int, help="denoising steps (default: the checkpoint's)")
    parser.add_argument("--device", choices=["auto", "cuda", "cpu"], default="auto")
    series.add_options(parser, seconds=math.inf)


def check(arguments: argparse.Namespace) -> tuple[torch.device, Defaults]:
    """Where it runs, and what the checkpoint is called with.

    Raises:
        UsageError: the device or the checkpoint can't be had, the checkpoint edits images, a number is below 1 or the
            output can't be written.
    """
    device, known = command_line.device(arguments), checkpoints.defaults(arguments.checkpoint)
    if known.takes_image:
        raise UsageError(f"{arguments.checkpoint} edits an image: use one that draws from a prompt alone")
    for name, value in vars(arguments).items():
        if isinstance(value, int) and not isinstance(value, bool) and name != "seed" and value < 1:
            raise UsageError(f"--{name} {value}: give at least 1")
    results.check_output(arguments.output)
    return device, known


def run(
    name: str,
    first: Sequence[str],
    measure: Callable[[Recipe], dict[str, Any]],
    header: str,
    line: Callable[[dict[str, Any]], str],
    arguments: argparse.Namespace,
    device: torch.device,
    about: dict[str, Any],
) -> None:
    """`series.run` of the recipes `first` and then of those asked for, each once, in memory that none before it holds.

    A row's `recipe` has the name by which it was asked for.

    Raises:
        RecipeError: a recipe that was asked for is none.
        UserError: not all were measured.
    """
    names: dict[Recipe, str] = {}
    for text in (*first, *arguments.recipes):
        names.setdefault(recipes.parse(text), text)
    measurements = [
        series.Measurement(
            {"recipe": {"name": text, "hash": recipe.hash, **recipe.to_dict()}},
            partial(_alone, measure, recipe, device),
        )
        for recipe, text in names.items()
    ]
    rows = series.run(name, measurements, header, line, arguments, device, about)
    if failed := [row["recipe"]["name"] for row in rows if "failed" in row]:
        raise UserError(f"not measured: {'; '.join(failed)}")


def _alone(measure: Callable[[Recipe], dict[str, Any]], recipe: Recipe, device: torch.device) -> dict[str, Any]:
    recipes.check(recipe, device)
    torch._dynamo.reset()  # the recipe compiles for itself
    reset_peak(device)
    return measure(recipe)
