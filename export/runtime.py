"""Run a pipeline's transformer and VAE decoder from packages."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from diffusers import DiffusionPipeline
from torch import nn

from export.package import PackageStore, signature

if TYPE_CHECKING:  # recipes import export, to execute what it builds
    from recipes.recipe import Recipe


class PackagedForward:
    """Stands in for a module's forward: one package for each kind of input, fetched at the first such call.

    options: Inductor's, for packages that have to be built.
    """

    def __init__(self, part: str, module: nn.Module, recipe: Recipe, options: dict[str, Any], packages: PackageStore):
        self.part, self.module, self.recipe, self.options, self.packages = part, module, recipe, options, packages
        self.original = module.forward
        self.loaded: dict[str, Callable] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        key = signature(args, kwargs)
        if key not in self.loaded:
            around = self.module.forward  # this object, or what was put around it since
            self.module.forward = self.original  # export sees the module as it was
            try:
                self.loaded[key] = self.packages.get(self.part, self.module, self.recipe, self.options, args, kwargs)
            finally:
                self.module.forward = around
        return self.loaded[key](*args, **kwargs)


def attach(pipe: DiffusionPipeline, recipe: Recipe, options: dict[str, Any], packages: PackageStore) -> str:
    """Let packages do the work of `pipe.transformer` and `pipe.vae.decoder`; the pipeline is called as before."""
    for part, module in (("transformer", pipe.transformer), ("vae_decoder", pipe.vae.decoder)):
        module.requires_grad_(False)
        module.forward = PackagedForward(part, module, recipe, options, packages)
    return "torch.export + AOTInductor, transformer and VAE decoder"
