"""Run a pipeline's transformer and VAE decoder from packages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from diffusers import DiffusionPipeline
from torch import nn

from export.package import PackageStore, signature
from recipes.compile import inductor_options
from recipes.recipe import Recipe


class PackagedForward:
    """Stands in for a module's forward: one package for each kind of input, fetched at the first such call."""

    def __init__(self, part: str, module: nn.Module, recipe: Recipe, packages: PackageStore):
        self.part, self.module, self.recipe, self.packages = part, module, recipe, packages
        self.loaded: dict[str, Callable] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        key = signature(args, kwargs)
        if key not in self.loaded:
            del self.module.forward  # export sees the module as it is
            try:
                self.loaded[key] = self.packages.get(
                    self.part, self.module, self.recipe, inductor_options(self.recipe), args, kwargs
                )
            finally:
                self.module.forward = self
        return self.loaded[key](*args, **kwargs)


def attach(pipe: DiffusionPipeline, recipe: Recipe, packages: PackageStore) -> str:
    """Let packages do the work of `pipe.transformer` and `pipe.vae.decoder`; the pipeline is called as before."""
    for part, module in (("transformer", pipe.transformer), ("vae_decoder", pipe.vae.decoder)):
        module.requires_grad_(False)
        module.forward = PackagedForward(part, module, recipe, packages)
    return "torch.export + AOTInductor, transformer and VAE decoder"
