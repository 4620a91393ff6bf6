"""A LoRA on a running pipeline, without compiling anew: what it touches is computed again, and written in place.

The weights that a recipe left (query, key and value fused, float8, ...) can't be changed back, and a copy of them would
take their memory twice. So a touched layer is read again from the checkpoint's files, and goes the recipe's way once
more: the LoRA added in float32, fused, quantized. Compiled code, packages that hold no weights and CUDA graphs read
the weights where they lie, and need nothing.

The result is that of diffusers' `pipe.load_lora_weights` and `pipe.fuse_lora` before the recipe, up to the rounding of
one addition; `remove` gives back the checkpoint's weights bit for bit.
"""

from __future__ import annotations

import math
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

import recipes
from export import lora_file
from export.lora_file import LoRA
from export.runtime import runs_embedded_weights
from export.stored_weights import StoredWeights
from recipes import hoisting
from recipes.recipe import Recipe
from recipes.weights import Weight, weights
from utils import checkpoints
from utils.errors import UsageError, UserError, one_line


@dataclass(frozen=True)
class _Loaded:
    lora: LoRA
    scale: float


class Adapter:
    """One LoRA at a time on the transformer of `pipe`, which was loaded from `checkpoint` (`utils.checkpoints`).

    Whatever is raised, also half-way, the pipeline is as it was before the call. But where the files can't be read any
    more, what was written can't be undone: then the error says so, and until `remove` has restored the rest, the
    transformer refuses calls, and the adapter refuses `load` and `scale`.

    Raises:
        UsageError: the checkpoint is unknown, or random/..., which has no files to read.
        UserError: its files can't be had or read.
    """

    def __init__(self, pipe: DiffusionPipeline, checkpoint: str):
        self._pipe, self._checkpoint = pipe, checkpoint
        self._files = StoredWeights(checkpoints.folder(checkpoint) / "transformer")
        self._loaded: _Loaded | None = None
        self._begun: set[Weight] = set()  # written by a change that was neither ended nor undone
        self._refusing = ExitStack()  # the transformer's calls, meanwhile

    @property
    def bytes_read(self) -> int:
        """Of the checkpoint's tensors, read so far."""
        return self._files.bytes_read

    def load(self, lora: LoRA | str | Path, scale: float = 1.0) -> None:
        """Put a LoRA (`lora_file.read`, or what it takes) into effect, in place of the one before it.

        Raises:
            UsageError: the file can't be used (`lora_file.read`) or is for another architecture; the pipeline's
                weights aren't the checkpoint's, or a package's; `scale` isn't finite; part of a LoRA is left.
            UserError: a file could not be downloaded or read.
        """
        self._check_whole()
        if not isinstance(lora, LoRA):
            lora = lora_file.read(lora)
        self._check(lora)
        self._become(_Loaded(lora, _finite(scale)))

    def scale(self, scale: float) -> None:
        """Change the loaded LoRA's scale.

        Raises:
            UsageError: none is loaded, or part of one is left; `scale` isn't finite.
            UserError: the checkpoint's files can't be read.
        """
        self._check_whole()
        self._become(_Loaded(self._present().lora, _finite(scale)))

    def remove(self) -> None:
        """Give the touched layers the checkpoint's weights back, bit for bit; also where only part of a LoRA is left.

        Raises:
            UsageError: none is loaded.
            UserError: the checkpoint's files can't be read.
        """
        if not self._begun:
            self._present()
        self._become(None)

    def _present(self) -> _Loaded:
        if self._loaded is None:
            raise UsageError("no LoRA is loaded")
        return self._loaded

    def _check_whole(self, *_: Any) -> None:
        """Raise UsageError while part of a LoRA is left; also a hook before the transformer's calls."""
        if self._begun:
            raise UsageError(self._what_is_left())

    def _what_is_left(self) -> str:
        return (
            f"part of a LoRA is left, as {len(self._begun)} of the layers couldn't be restored: before anything else "
            f"call the adapter's remove(), which does that once {self._checkpoint} can be read again"
        )

    def _check(self, lora: LoRA) -> None:
        """Raise UsageError unless each layer of `lora` is one of the transformer's, of the same shape."""
        there = {layer for weight in self._weights() for layer in weight.layers}
        for layer, factors in lora.layers.items():
            name = f"{layer}.weight"
            if layer not in there or name not in self._files:
                raise UsageError(f"the LoRA {lora.source} is for another architecture: there is no layer {layer}")
            if factors.shape != self._files.shape(name):
                raise UsageError(
                    f"the LoRA {lora.source} is for another architecture: its {layer} is {factors.shape}, "
                    f"that of {self._checkpoint} {self._files.shape(name)}"
                )

    def _weights(self) -> list[Weight]:
        recipe = recipes.applied(self._pipe) or Recipe()
        return weights(self._pipe.transformer, recipe.quantization)

    @torch.no_grad()
    def _become(self, new: _Loaded | None) -> None:
        """Write every weight that `new` or the LoRA before it touches, and what is left of a change before."""
        if runs_embedded_weights(self._pipe):
            raise UsageError(
                "the pipeline runs a package with weights inside, which a LoRA can't reach: build it without "
                "--embed-weights"
            )
        try:
            for weight in self._weights():
                written = weight in self._begun or _touches(self._loaded, weight)
                if not (written or _touches(new, weight)):
                    continue
                plain = self._read(weight)
                if not (written or weight.holds(_with(None, plain))):
                    raise UsageError(
                        f"{weight.layers[0]} is not as in {self._checkpoint}: the pipeline was loaded from another "
                        "checkpoint, in another dtype than its recipe's, or has a LoRA already"
                    )
                self._begun.add(weight)
                weight.write(_with(new, plain))
            self._loaded, self._begun = new, set()
        except BaseException as error:
            self._undo()
            if self._begun and isinstance(error, Exception):  # Ctrl-C still ends a program; the next call says it
                raise UserError(f"{one_line(error)}; {self._what_is_left()}") from error
            raise
        finally:
            hoisting.forget(self._pipe.transformer)
            self._refuse_calls()

    def _undo(self) -> None:
        """Write again what the weights held before the change that was begun; what can't be read stays begun."""
        for weight in tuple(self._begun):
            with suppress(Exception):
                weight.write(_with(self._loaded, self._read(weight)))
                self._begun.remove(weight)

    def _refuse_calls(self) -> None:
        """Let the transformer refuse its calls if part of a LoRA is left, and else take them again."""
        self._refusing.close()
        if self._begun:
            self._refusing.enter_context(self._pipe.transformer.register_forward_pre_hook(self._check_whole))

    def _read(self, weight: Weight) -> dict[str, torch.Tensor]:
        """The checkpoint's layers whose rows a weight has, in its dtype before it was quantized."""
        device = self._pipe.transformer.x_embedder.weight.device  # what was offloaded is computed there, too
        return {layer: self._files.read(f"{layer}.weight").to(device, weight.dtype) for layer in weight.layers}


def _with(loaded: _Loaded | None, plain: dict[str, torch.Tensor]) -> torch.Tensor:
    """A weight [out features, in features] of these layers' rows, with a LoRA or without."""
    of_lora = loaded.lora.layers if loaded else {}
    rows = [of_lora[n].added_to(w, loaded.scale) if loaded and n in of_lora else w for n, w in plain.items()]
    return torch.cat(rows)


def _touches(loaded: _Loaded | None, weight: Weight) -> bool:
    return loaded is not None and not loaded.lora.layers.keys().isdisjoint(weight.layers)


def _finite(scale: float) -> float:
    if not math.isfinite(scale):
        raise UsageError(f"a LoRA's scale is a finite number, not {scale}")
    return float(scale)
