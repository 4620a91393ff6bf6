"""What a pipeline is asked for: one frozen value, checked before any weight is loaded."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL import Image, ImageOps

import recipes
from utils.errors import UsageError, advising
from utils.quiet import quiet

MULTIPLE = 16  # pixels: 8 by the VAE, 2 by the packing of latents into tokens
LONGEST_TEXT = 512  # T5 tokens, by FluxPipeline.check_inputs of diffusers


def check_side(what: str, pixels: int) -> None:
    """Raise UsageError, which begins with `what`, unless an image may be so high or wide."""
    if pixels <= 0 or pixels % MULTIPLE:
        below = max(MULTIPLE, pixels // MULTIPLE * MULTIPLE)
        raise UsageError(f"{what} is not a positive multiple of {MULTIPLE}: try {below} or {below + MULTIPLE}")


@dataclass(frozen=True)
class Request:
    """height and width in pixels; max_sequence_length in T5 tokens; image i of a batch is drawn from seed + i.

    Raises:
        UsageError: a value is out of range, or `image` can't be read.
    """

    prompt: str
    height: int
    width: int
    steps: int
    guidance: float
    max_sequence_length: int
    batch: int = 1
    seed: int = 42
    image: Path | None = None

    def __post_init__(self) -> None:
        for name in ("height", "width"):
            check_side(f"--{name} {getattr(self, name)}", getattr(self, name))
        for name in ("steps", "batch"):
            if getattr(self, name) < 1:
                raise UsageError(f"--{name} {getattr(self, name)}: give at least 1")
        if not 1 <= self.max_sequence_length <= LONGEST_TEXT:
            raise UsageError(f"--text-lengths {self.max_sequence_length}: give 1 to {LONGEST_TEXT}, FLUX takes no more")
        if not math.isfinite(self.guidance):
            raise UsageError(f"--guidance {self.guidance}: give a finite number")
        if not 0 <= self.seed < 2**63 - self.batch:
            raise UsageError(f"--seed {self.seed}: give a number from 0 to 2^63 - batch")
        if not self.prompt.strip():
            raise UsageError('the prompt is empty: say what to draw, as in --prompt "a red circle"')
        if self.image is not None:
            self.open_image()

    def to_dict(self) -> dict[str, Any]:
        """For a result file: an image by its name, without the machine's folders, and its size, which makes tokens."""
        if self.image is None:
            return dict(vars(self))
        width, height = self.open_image().size
        return {**vars(self), "image": self.image.name, "image_size": [height, width]}

    def open_image(self) -> Image.Image:
        assert self.image is not None
        try:
            with Image.open(self.image) as file:
                image = ImageOps.exif_transpose(file).convert("RGB")
            # The VAE needs a token's worth of pixels each way; anything larger keeps its size.
            width, height = (max(MULTIPLE, side) for side in image.size)
            return image.resize((width, height))
        except FileNotFoundError:
            raise UsageError(f"--image {self.image}: no such file") from None
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise UsageError(f"--image {self.image} can't be read as an image ({error})") from None

    def arguments(self, pipe: DiffusionPipeline) -> dict[str, Any]:
        """The keyword arguments of `pipe`'s call."""
        arguments: dict[str, Any] = {
            "prompt": self.prompt,
            "height": self.height,
            "width": self.width,
            "num_inference_steps": self.steps,
            "guidance_scale": self.guidance,
            "max_sequence_length": self.max_sequence_length,
            "num_images_per_prompt": self.batch,
            "latents": noise(pipe, self.height, self.width, range(self.seed, self.seed + self.batch)),
        }
        if self.image is not None:
            # Kontext would scale the output and the image to about a megapixel: take the sizes that were asked for.
            arguments |= {"image": self.open_image(), "max_area": self.height * self.width, "_auto_resize": False}
        return arguments

    def run(self, pipe: DiffusionPipeline) -> list[Image.Image]:
        """
        Raises:
            OutOfMemoryError: memory ran out, in a call of this size and by the recipe that was applied to `pipe`.
        """
        # Of tokens that were cut, `warn_of_cut_tokens` tells in a line.
        with quiet(), advising("while drawing", lambda: self._saving_memory(pipe)):
            return pipe(**self.arguments(pipe)).images

    def _saving_memory(self, pipe: DiffusionPipeline) -> str:
        """What of this request, and of the recipe, lowers the memory that it takes."""
        options = ["--batch"] if self.batch > 1 else []
        options += [f"--{name}" for name in ("height", "width") if getattr(self, name) > MULTIPLE]
        recipe = recipes.applied(pipe)
        ways = [f"a smaller {' or '.join(options)}"] if options else []
        if recipe is not None and (saving := recipes.saving_memory(recipe, pipe.device)):
            ways.append(saving)
        return f"use {', or '.join(ways) or 'a device with more memory free'}"


def noise(pipe: DiffusionPipeline, height: int, width: int, seeds: Sequence[int]) -> torch.Tensor:
    """What the denoising of images of `height` x `width` pixels begins with, one a seed: float32 [n, tokens, 64].

    On the CPU and in float32, whatever the pipeline's: the same image on every device and in every dtype. The pipeline
    would draw in its own dtype, and PyTorch 2.11 draws other numbers in bfloat16 than in float32.
    """
    channels = pipe.transformer.config.in_channels // 4  # a token is 2 x 2 places
    rows, columns = (2 * (side // (2 * pipe.vae_scale_factor)) for side in (height, width))
    drawn = [torch.randn(1, channels, rows, columns, generator=torch.Generator("cpu").manual_seed(s)) for s in seeds]
    return pipe._pack_latents(torch.cat(drawn), len(drawn), channels, rows, columns)


def warn_of_cut_tokens(pipe: DiffusionPipeline, request: Request) -> None:
    """Say on stderr how many of the prompt's tokens each text encoder won't see."""
    limits = (
        (pipe.tokenizer_2, request.max_sequence_length, "T5"),
        (pipe.tokenizer, pipe.tokenizer_max_length, "CLIP"),
    )
    for tokenizer, limit, name in limits:
        tokens = len(tokenizer(request.prompt, truncation=False, verbose=False).input_ids)
        if tokens > limit:
            print(
                f"warning: the prompt has {tokens} {name} tokens, {limit} fit: the last {tokens - limit} were cut",
                file=sys.stderr,
            )
