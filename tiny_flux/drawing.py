"""What the model draws while it is trained: latents from noise, images from latents, and the checker's verdicts."""

from __future__ import annotations

import itertools
import math
import tempfile
from collections.abc import Callable
from concurrent.futures import Future
from types import TracebackType

import numpy as np
import torch
from diffusers import AutoencoderKL, FluxPipeline

from tiny_flux import ranks
from tiny_flux.check_pool import check_pool
from tiny_flux.checker import Verdict, check
from tiny_flux.data import Captions
from tiny_flux.flow import Predicted, shifted
from tiny_flux.model import SHIFT
from tiny_flux.scenes import IMAGE_SIZE, Description
from tiny_flux.stage import autocast

_IMAGE = (IMAGE_SIZE, IMAGE_SIZE, 3)
_AT_ONCE = 16  # images that a process is given to judge


@torch.no_grad()
def sample(
    forward: Callable[..., Predicted], noise: torch.Tensor, captions: Captions, steps: int, device: torch.device
) -> torch.Tensor:
    """Packed latents float32 [n, 256, 64] from noise of that shape, in Euler steps at the scheduler's noise levels."""
    x = noise.float()
    for now, then in itertools.pairwise(shifted(torch.linspace(1, 0, steps + 1, device=device), SHIFT)):
        with autocast(device):
            predicted = forward(x, now.expand(len(x)), captions.t5_ids, captions.clip_ids).velocity
        x = x - predicted.float() * (now - then)
    return x


@torch.no_grad()
def decode(vae: AutoencoderKL, latents: torch.Tensor) -> torch.Tensor:
    """Images uint8 [n, 256, 256, 3] of packed latents [n, 256, 64]."""
    x = FluxPipeline._unpack_latents(latents.float(), IMAGE_SIZE, IMAGE_SIZE, 8)
    with autocast(latents.device):
        images = vae.decode(x / vae.config.scaling_factor + vae.config.shift_factor).sample
    return ((images.float() / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1)


class Judges:
    """The checker in as many processes as there are cores for this one of the training's processes.

    Images are handed over in a file that all map into memory, with room for `most` until `verdicts` takes them back.
    """

    def __init__(self, most: int):
        self._file = tempfile.NamedTemporaryFile(prefix="flux-fast-images-")  # noqa: SIM115, closed by `with`
        self._images = np.memmap(self._file.name, np.uint8, "w+", shape=(most, *_IMAGE))
        self._processes = check_pool(ranks.count())
        self._pending: list[Future[list[Verdict]]] = []
        self._given = 0

    def __enter__(self) -> Judges:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._processes.shutdown(cancel_futures=True)
        self._file.close()

    def give(self, images: torch.Tensor, descriptions: list[Description]) -> None:
        """Have images uint8 [n, 256, 256, 3] judged; doesn't wait."""
        start, self._given = self._given, self._given + len(images)
        self._images[start : self._given] = images.cpu().numpy()
        for first in range(0, len(images), _AT_ONCE):
            part = descriptions[first : first + _AT_ONCE]
            self._pending.append(self._processes.submit(_judge, self._file.name, start + first, part))

    def verdicts(self) -> list[Verdict]:
        """Of all images given since the last call, in their order."""
        pending, self._pending, self._given = self._pending, [], 0
        return [verdict for future in pending for verdict in future.result()]


def _judge(file: str, start: int, descriptions: list[Description]) -> list[Verdict]:
    shape = (len(descriptions), *_IMAGE)
    images = np.memmap(file, np.uint8, "r", start * math.prod(_IMAGE), shape)
    return [check(image, description) for image, description in zip(images, descriptions, strict=True)]
