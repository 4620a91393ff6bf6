"""The denoising loop is prepared while the GPU still encodes the prompt.

After the text encoders' kernels are queued, diffusers makes position ids, noise and timesteps on the host and copies
them to the GPU. From pageable memory that makes the host wait until all is done that was queued before, so that the GPU
then waits for the host, which prepares the rest and the first step: 4 to 6.5 ms on an H100. From pinned memory the
copies are queued like kernels: in the same order, on the same stream, with the same values.

Source: FluxPipeline.encode_prompt and prepare_latents, FlowMatchEulerDiscreteScheduler.set_timesteps of diffusers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch.overrides import TorchFunctionMode

from recipes.optimization import Needs, Optimization
from recipes.recipe import Recipe
from utils.mixin import mix_in


class Queued(TorchFunctionMode):
    """In its body, what `tensor.to(device)` copies from pageable memory to a GPU goes by way of pinned memory, and is
    queued. PyTorch keeps that memory for the next call. What says itself whether it waits, such as a module that is
    moved, is left alone.
    """

    def __torch_function__(self, function: Callable, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is torch.Tensor.to and _would_wait(*args, **kwargs):
            return _queued(*args, **kwargs)
        return function(*args, **kwargs)


def _would_wait(
    tensor: torch.Tensor, device: Any = None, dtype: Any = None, *others: Any, non_blocking: Any = None, **more: Any
) -> bool:
    """Whether the host would wait in `tensor.to` of these arguments."""
    if tensor.device.type != "cpu" or others or more or non_blocking is not None:
        return False
    return isinstance(device, (str, torch.device)) and torch.device(device).type == "cuda" and not tensor.is_pinned()


def _queued(tensor: torch.Tensor, device: Any, dtype: Any = None) -> torch.Tensor:
    """`tensor.to` of these arguments. On the way, PyTorch would cast it to other memory, which isn't pinned."""
    cast = tensor if dtype is None else tensor.to(dtype)
    return cast.pin_memory().to(device, non_blocking=True)


class EarlyPipeline(DiffusionPipeline):
    """Mixin for a Flux pipeline: what follows the text encoders up to the loop is queued behind them."""

    _encoding: ExitStack | None = None  # while encode_prompt runs

    def encode_prompt(self, *args: Any, **kwargs: Any) -> Any:
        """As the pipeline's own; the encoders, which may be compiled, run as ever."""
        try:
            with ExitStack() as self._encoding:
                if kwargs.get("prompt_embeds") is not None:
                    self._encoding.enter_context(Queued())
                return super().encode_prompt(*args, **kwargs)
        finally:
            self._encoding = None

    def _get_t5_prompt_embeds(self, *args: Any, **kwargs: Any) -> Any:
        """As the pipeline's own, which is the last encoder."""
        embeddings = super()._get_t5_prompt_embeds(*args, **kwargs)
        if self._encoding is not None:
            self._encoding.enter_context(Queued())
        return embeddings

    def prepare_latents(self, *args: Any, **kwargs: Any) -> Any:
        with Queued():
            return super().prepare_latents(*args, **kwargs)


def _apply(pipe: DiffusionPipeline, recipe: Recipe) -> str:
    kind = type(pipe.scheduler)

    @functools.wraps(kind.set_timesteps)  # the pipeline looks at its signature
    def set_timesteps(self: Any, *args: Any, **kwargs: Any) -> None:
        with Queued():
            kind.set_timesteps(self, *args, **kwargs)

    mix_in(pipe, EarlyPipeline)
    mix_in(pipe.scheduler, set_timesteps=set_timesteps)
    return "copies before the loop are queued"


OPTIMIZATION = Optimization(
    field="early_preparation",
    needs=lambda recipe: Needs(),
    lossless=lambda recipe: True,
    apply=_apply,
    not_timed=lambda device: None if device.type == "cuda" else "without a GPU nothing is copied before the loop",
)
