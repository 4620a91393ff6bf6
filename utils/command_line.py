"""The options that both scripts take, and what they make of them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import recipes
from export import lora_file
from export.lora_file import LoRA
from export.store import PackageStore, default_folder
from recipes.flux_fast_flags import add_flags, recipe_from_flags
from recipes.recipe import Recipe
from utils import checkpoints, environment, results
from utils.errors import UsageError
from utils.paying import not_paying
from utils.request import Request

WITHOUT_CACHED_MODEL = "run once without --use-cached-model"


def add_options(parser: argparse.ArgumentParser) -> None:
    """What to run, and on what; shared by gen_image.py and run_benchmark.py."""
    parser.add_argument(
        "--checkpoint", help="hub id, folder, tiny, or random/flux-...; default: FLUX.1-schnell, tiny on a CPU"
    )
    parser.add_argument("--prompt", help="what to draw")
    parser.add_argument(
        "--recipe", help="a rung's name, with changes: float8,attention=native; default: the fastest here"
    )
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--steps", type=int, help="denoising steps (default: the checkpoint's)")
    parser.add_argument("--guidance", type=float, help="distilled guidance (default: the checkpoint's)")
    parser.add_argument("--height", type=int, help="pixels, a multiple of 16")
    parser.add_argument("--width", type=int, help="pixels, a multiple of 16")
    parser.add_argument("--batch", type=int, default=1, help="images a call")
    parser.add_argument("--image", type=Path, help="the image that Kontext edits")
    parser.add_argument("--device", choices=["auto", "cuda", "cpu"], default="auto", help="auto: cuda if there is one")
    parser.add_argument(
        "--cache-dir", type=Path, help=f"ahead-of-time packages (default: {default_folder()}; benchmarks: a fresh one)"
    )
    parser.add_argument("--use-cached-model", action="store_true", help="use packages that are there, build none")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    add_flags(parser)


def device(arguments: argparse.Namespace) -> torch.device:
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: PyTorch sees no CUDA device here; use --device cpu or auto")
    wanted = arguments.device
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(wanted)


def checkpoint(arguments: argparse.Namespace, where: torch.device) -> str:
    return arguments.checkpoint or ("black-forest-labs/FLUX.1-schnell" if where.type == "cuda" else "tiny")


def recipe(arguments: argparse.Namespace, where: torch.device) -> tuple[Recipe, str]:
    """The recipe and how it was chosen, for the first line printed."""
    asked = recipe_from_flags(arguments)
    if asked is not None and arguments.recipe:
        raise UsageError("--recipe and flux-fast's flags both choose a recipe: give one of them")
    if asked is not None:
        return asked, f"{recipes.command_line_name(asked)} (from flux-fast's flags)"
    if arguments.recipe:
        return recipes.parse(arguments.recipe), arguments.recipe
    chosen = fastest(checkpoint(arguments, where), where)
    return chosen, f"{recipes.command_line_name(chosen)} (the fastest on this machine)"


def fastest(checkpoint: str, where: torch.device) -> Recipe:
    """The ladder's top on this machine, without the rungs that are known not to pay there."""
    return recipes.fastest(where, not_paying(results.RESULTS, environment.capture(where), checkpoint))


def packages(arguments: argparse.Namespace) -> PackageStore:
    """Where gen_image.py's packages lie. What is missing is built only if the user said so: with --build-packages, or
    with flux-fast's flags, which build as they do there.

    Raises:
        UsageError: both --build-packages and --use-cached-model.
    """
    folder, flags = arguments.cache_dir or default_folder(), recipe_from_flags(arguments) is not None
    if arguments.build_packages and arguments.use_cached_model:
        raise UsageError("--use-cached-model builds nothing, and --build-packages what is missing: give one of them")
    if arguments.use_cached_model:
        instead = "" if flags else " but with --build-packages"
        return PackageStore(folder, build=False, to_build=f"{WITHOUT_CACHED_MODEL}{instead}")
    return PackageStore(folder, build=arguments.build_packages or flags, to_build="add --build-packages")


def lora(arguments: argparse.Namespace, checkpoint: str) -> tuple[LoRA, float] | None:
    """The LoRA asked for and its scale, read before any weight is loaded.

    Raises:
        UsageError: it can't be used (`lora_file.read`), or the checkpoint has no files to compute its layers from.
        UserError: it could not be downloaded.
    """
    if arguments.lora is None:
        return None
    checkpoints.folder(checkpoint)
    path, _, scale = arguments.lora.rpartition(":")
    try:
        asked = (path, float(scale)) if path else (arguments.lora, 1.0)
    except ValueError:  # the colon is the path's own
        asked = (arguments.lora, 1.0)
    return lora_file.read(asked[0]), asked[1]


def request(arguments: argparse.Namespace, checkpoint: str) -> Request:
    """Options not given are the checkpoint's defaults.

    Raises:
        UsageError: a value is out of range, or Kontext was given no image, or another checkpoint was given one.
    """
    known = checkpoints.defaults(checkpoint)
    if known.takes_image and arguments.image is None:
        raise UsageError(f"{checkpoint} edits an image: give one with --image")
    if arguments.image is not None and not known.takes_image:
        raise UsageError(f"{checkpoint} takes no image: leave --image out, or use FLUX.1-Kontext-dev")

    def given(name: str) -> Any:
        value = getattr(arguments, name)
        return getattr(known, name) if value is None else value

    return Request(
        prompt=known.prompt if arguments.prompt is None else arguments.prompt,
        height=given("height"),
        width=given("width"),
        steps=given("steps"),
        guidance=given("guidance"),
        max_sequence_length=known.max_sequence_length,
        batch=arguments.batch,
        seed=arguments.seed,
        image=arguments.image,
    )


def baseline(checkpoint: str) -> str:
    return checkpoints.defaults(checkpoint).baseline


def names(texts: Sequence[str] | None) -> frozenset[str]:
    """Of an option that takes several, with spaces or commas between them."""
    return frozenset(name for text in texts or () for name in text.split(",") if name)
