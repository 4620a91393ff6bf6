"""What every optimization says of itself, and what it needs."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from torch.torch_version import TorchVersion

from recipes import guards
from recipes.recipe import Recipe, default


@dataclass(frozen=True)
class Needs:
    """What must be there: a kind of device, a CUDA compute capability (at least, and below), packages, a compiler.

    dtype_on_cuda: the recipe's dtype that the kernels on a GPU take, where they don't take both. torch_on_cpu: the
    PyTorch that a CPU needs, at least. One of `packages` is enough. loading_error(): why what they load can't be had,
    in one line; asked last.
    """

    device: str | None = None
    capability: tuple[int, int] | None = None
    capability_below: tuple[int, int] | None = None
    dtype_on_cuda: str | None = None
    torch_on_cpu: tuple[int, int] = (2, 11)
    packages: tuple[str, ...] = ()
    compiler: bool = False
    loading_error: Callable[[], str | None] = lambda: None

    def missing(self, device: torch.device, dtype: str) -> str | None:
        """What `device`, this Python and a recipe of `dtype` lack, in words; None when nothing is missing."""
        if self.device is not None and device.type != self.device:
            return f"needs a {self.device} device, this is {device.type}"
        if self.capability is not None and device.type == "cuda":
            have = torch.cuda.get_device_capability(device)
            if have < self.capability or (self.capability_below and have >= self.capability_below):
                wanted = _dotted(self.capability)
                wanted += f" to below {_dotted(self.capability_below)}" if self.capability_below else ""
                name = torch.cuda.get_device_name(device)
                return f"needs compute capability {wanted}, {name} has {_dotted(have)}"
        if self.dtype_on_cuda not in (None, dtype) and device.type == "cuda":
            return f"needs dtype={self.dtype_on_cuda} on a GPU, this is {dtype}"
        if device.type == "cpu" and TorchVersion(torch.__version__) < _dotted(self.torch_on_cpu):
            return f"needs PyTorch {_dotted(self.torch_on_cpu)} or newer on a CPU, this is {torch.__version__}"
        if self.packages and not any(importlib.util.find_spec(package) for package in self.packages):
            return f"needs the package {' or '.join(self.packages)}, not installed (see requirements-gpu.txt)"
        if error := self.loading_error():
            return f"needs its kernel: {error}"
        return _missing_for_compiling(device) if self.compiler else None


@dataclass(frozen=True)
class Optimization:
    """One field of the recipe and how it is put into effect.

    needs(recipe): what this recipe's value of the field needs.
    lossless(recipe): whether the result equals the plain one's up to rounding.
    apply(pipe, recipe): changes the pipeline in place, returns what was really done in a few words (execution's takes
        the store of packages too).
    not_timed(device): why timing it on this device would mean nothing, if so.
    always: applied for the default value too (a dtype has to be something).
    components: of the pipeline, which it can't do without.
    merges_weights(recipe): whether it makes something else of the transformer's weights, or of the graph that they are
        read in, so that LoRA layers beside them would count for nothing or stay as they are.
    replaces_forward(recipe): whether it puts something in place of modules' forward, bound to these modules.
    without_hooks(recipe): whether it takes it that no module has hooks, as all do that replace forwards.
    replaces_attention(recipe): whether the transformer's attention processors make way for others.
    unfit(recipe, pipe): why it can't take this pipeline's transformer, in words, if so.
    """

    field: str
    needs: Callable[[Recipe], Needs]
    lossless: Callable[[Recipe], bool]
    apply: Callable[..., str]
    not_timed: Callable[[torch.device], str | None] = lambda device: None
    always: bool = False
    components: tuple[str, ...] = ()
    merges_weights: Callable[[Recipe], bool] = lambda recipe: False
    replaces_forward: Callable[[Recipe], bool] = lambda recipe: False
    without_hooks: Callable[[Recipe], bool] = lambda recipe: False
    replaces_attention: Callable[[Recipe], bool] = lambda recipe: False
    unfit: Callable[[Recipe, DiffusionPipeline], str | None] = lambda recipe, pipe: None

    def requested(self, recipe: Recipe) -> bool:
        return self.always or getattr(recipe, self.field) != default(self.field)

    def hookless(self, recipe: Recipe) -> bool:
        """Whether hooks of the pipeline's modules would go by it."""
        return self.replaces_forward(recipe) or self.without_hooks(recipe)

    def refusal(self, recipe: Recipe, device: torch.device, pipe: DiffusionPipeline | None = None) -> str | None:
        """Why this recipe's value of the field can't be applied on `device`, to `pipe`; None if it can."""
        if not self.requested(recipe):
            return None
        reason = self.needs(recipe).missing(device, recipe.dtype) or (pipe and self._missing(recipe, pipe))
        return f"{self.field}={getattr(recipe, self.field)} {reason}" if reason else None

    def _missing(self, recipe: Recipe, pipe: DiffusionPipeline) -> str | None:
        """What the pipeline lacks, or has too much, in words; None when all is well."""
        for part in self.components:
            if getattr(pipe, part, None) is None:
                return f"needs the pipeline's {part}, which isn't there"
        if self.merges_weights(recipe) and guards.has_lora(pipe):
            return (
                "needs a transformer without LoRA layers: call fuse_lora and unload_lora_weights before, or load it "
                "afterwards with export.lora.Adapter"
            )
        if self.hookless(recipe) and (name := guards.hooked(pipe)):
            return (
                f"needs a pipeline without hooks, {name} has some: load it without offloading, layerwise casting and "
                "caching"
            )
        if reason := self.unfit(recipe, pipe):
            return reason
        if self.replaces_attention(recipe) and (name := guards.other_attention(pipe)):
            return f"would take {name} away, which the transformer's attention has: load it without (an IP-Adapter)"
        return None


def _missing_for_compiling(device: torch.device) -> str | None:
    """What Inductor lacks to build its kernels."""
    if device.type == "cuda":
        return None if importlib.util.find_spec("triton") else "needs the package triton, not installed"
    if not any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "g++", "clang++")):
        return "needs a C++ compiler: install g++"
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        return "needs Python's C headers: install python3-dev"
    return None


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"
