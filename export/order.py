"""Packages on order: run the real pipeline once for each shape, and build what it called."""

from __future__ import annotations

import itertools
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from PIL import Image

import recipes
from export import text_encoders
from export.runtime import Library, PackagedCall, library_of
from export.store import Entry, PackageStore
from recipes.dtype import torch_dtype
from recipes.recipe import Recipe
from utils import checkpoints
from utils.compile_clock import CompileClock
from utils.errors import UsageError
from utils.files import check_target
from utils.request import MULTIPLE, Request

_STEPS = 2  # of the pipeline, for each shape: the second one's inputs come from the first


@dataclass(frozen=True)
class Order:
    """What a package is to hold. resolutions: height and width in pixels; text_lengths: T5 tokens.

    dynamic: models for all sizes from the smallest to the largest; of these sizes only where that is slower, and of
    text encoders.
    image_size: height and width in pixels of the image that Kontext edits; None: as what is drawn.
    """

    checkpoint: str
    recipe: Recipe
    resolutions: tuple[tuple[int, int], ...]
    batches: tuple[int, ...]
    text_lengths: tuple[int, ...]
    embed_weights: bool = False
    dynamic: bool = False
    image_size: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.recipe.execution != "aoti":
            raise UsageError("packages are for recipes with execution=aoti: add it, as in --recipe bf16,execution=aoti")
        if self.embed_weights and self.recipe.compile_scope != "whole":
            raise UsageError("--embed-weights is for whole models: add compile_scope=whole to the recipe")
        if self.dynamic and len(self.resolutions) * len(self.text_lengths) < 2:
            raise UsageError("--dynamic: give the smallest and the largest size with --resolutions, --text-lengths")
        if self.image_size is not None and not checkpoints.defaults(self.checkpoint).takes_image:
            raise UsageError(f"--image-size: {self.checkpoint} takes no image; leave it out")
        if self.image_size is not None and min(self.image_size) < MULTIPLE:
            raise UsageError(f"--image-size: give at least {MULTIPLE}x{MULTIPLE}")

    def requests(self) -> list[Request]:
        """A request for each shape. Raises UsageError: a resolution that can't be drawn, a text that is too long."""
        known = checkpoints.defaults(self.checkpoint)
        shapes = itertools.product(self.resolutions, self.batches, self.text_lengths)
        return [
            Request(known.prompt, height, width, _STEPS, known.guidance, text_length, batch)
            for (height, width), batch, text_length in shapes
        ]


def fill(order: Order, folder: Path, device: torch.device) -> list[tuple[Entry, bool]]:
    """Build the packages of `order` in `folder`, and say of each whether it was there already: what depends on the
    image's size, and, where the recipe has them compiled, the text encoders.

    Raises:
        UserError: the checkpoint can't be loaded, the recipe can't be applied here, ...
        UsageError: a shape can't be drawn, or `folder` not be written to; told before any weight is loaded.
    """
    requests = order.requests()
    check_target(folder)
    pipe, library = pipeline(order.checkpoint, order.recipe, folder, device)
    calls = called(pipe, library, requests, order.image_size)
    of_image, of_text = apart(calls)
    with CompileClock(progress=True):
        built = [library.build(of_image, order.embed_weights, order.dynamic)]
        return [*built, library.build(of_text)] if of_text else built


def apart(calls: list[PackagedCall]) -> tuple[list[PackagedCall], list[PackagedCall]]:
    """The calls of what depends on the image's size, and those of text encoders: a package each."""
    kinds: tuple[list[PackagedCall], list[PackagedCall]] = ([], [])
    for call in calls:
        kinds[call[0].region.component in text_encoders.COMPONENTS].append(call)
    return kinds


def called(
    pipe: DiffusionPipeline, library: Library, requests: list[Request], image_size: tuple[int, int] | None = None
) -> list[PackagedCall]:
    """How the pipeline calls what packages stand in for, for these requests: one call of each kind."""
    takes_image = checkpoints.defaults(library.checkpoint).takes_image
    with library.recording() as calls:
        for request in requests:
            tokens = f"{request.max_sequence_length} text tokens"
            print(f"calling {request.height}x{request.width}, batch {request.batch}, {tokens}", file=sys.stderr)
            pipe(**arguments(pipe, request, takes_image, image_size))
    return list(calls.values())


def pipeline(checkpoint: str, recipe: Recipe, folder: Path, device: torch.device) -> tuple[DiffusionPipeline, Library]:
    """The pipeline with the recipe's packages from `folder`, and nothing that isn't in their graphs."""
    plain = replace(recipe, cuda_graph=False, loop_graph=False)
    recipes.check(plain, device)
    pipe = checkpoints.load(checkpoint, torch_dtype(plain), device, progress=False)
    pipe.set_progress_bar_config(disable=True)
    recipes.apply(pipe, plain, PackageStore(folder))
    return pipe, library_of(pipe)


def arguments(pipe: DiffusionPipeline, request: Request, takes_image: bool, image_size: tuple[int, int] | None) -> dict:
    """The pipeline call's keyword arguments; to be edited, a blank image of `image_size`, or the request's."""
    given = request.arguments(pipe)
    if takes_image:
        height, width = image_size or (request.height, request.width)
        blank = Image.new("RGB", (width, height))
        given |= {"image": blank, "max_area": request.height * request.width, "_auto_resize": False}
    return given
