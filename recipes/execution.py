"""How the transformer and the VAE's decoder run: eagerly, compiled at the first call, or from packages built ahead, as
the text encoders then may."""

from __future__ import annotations

from diffusers import DiffusionPipeline

from export.store import PackageStore
from recipes import compile
from recipes.optimization import Needs, Optimization
from recipes.recipe import Recipe


def _needs(recipe: Recipe) -> Needs:
    return Needs(compiler=True)


def _apply(pipe: DiffusionPipeline, recipe: Recipe, packages: PackageStore) -> str:
    from export import runtime  # which knows recipes, and takes parts of them

    options = compile.inductor_options(recipe, pipe.device)
    if recipe.execution == "compile":
        done = compile.apply(pipe, recipe)
    else:
        done = runtime.attach(pipe, recipe, options, packages)
    return "; ".join([done, *(f"{name}={value}" for name, value in options.items())])


OPTIMIZATION = Optimization(
    field="execution",
    needs=_needs,
    lossless=lambda recipe: True,
    apply=_apply,
    merges_weights=lambda recipe: recipe.execution == "aoti",  # a LoRA's scale would be one of its constants
    replaces_forward=lambda recipe: True,
    replaces_attention=lambda recipe: recipe.execution == "aoti",  # by that which a package was built with
)
