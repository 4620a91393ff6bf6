"""Put a recipe into effect on a pipeline."""

from __future__ import annotations

import shlex
from collections.abc import Collection
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from diffusers import DiffusionPipeline, FluxTransformer2DModel

from export.store import PackageStore
from recipes import (
    attention,
    channels_last,
    cuda_graph,
    device_postprocessing,
    dtype,
    early_preparation,
    execution,
    float8,
    float8_text_encoder,
    fused_group_norm,
    fused_kernels,
    fused_qkv,
    gemm_epilogues,
    guards,
    hoisted_embeddings,
    hook_search,
    int8_adaln,
    loop_graph,
    modulation,
    scheduler_sync,
    step_cache,
    text_encoders,
    vae_attention,
)
from recipes.ladder import Rung, climb, command_line_name, named
from recipes.optimization import Optimization
from recipes.recipe import Recipe, RecipeError
from utils.errors import advising

# In the order of application: what changes weights before what is compiled over them, then what is captured, and last
# what leaves calls out.
OPTIMIZATIONS: tuple[Optimization, ...] = (
    dtype.OPTIMIZATION,
    scheduler_sync.OPTIMIZATION,
    hook_search.OPTIMIZATION,
    early_preparation.OPTIMIZATION,
    attention.OPTIMIZATION,
    fused_qkv.OPTIMIZATION,
    channels_last.OPTIMIZATION,
    float8.OPTIMIZATION,
    float8_text_encoder.OPTIMIZATION,
    fused_kernels.OPTIMIZATION,
    gemm_epilogues.OPTIMIZATION,
    int8_adaln.OPTIMIZATION,
    fused_group_norm.OPTIMIZATION,
    vae_attention.OPTIMIZATION,
    device_postprocessing.OPTIMIZATION,
    modulation.OPTIMIZATION,
    hoisted_embeddings.OPTIMIZATION,
    text_encoders.OPTIMIZATION,
    execution.OPTIMIZATION,
    loop_graph.OPTIMIZATION,
    cuda_graph.OPTIMIZATION,
    step_cache.OPTIMIZATION,
)
_MARK = "_applied_recipe"

# Fields whose change from one of some values to another saves memory, by how much it saves of FLUX.1-dev's weights:
# half of all, 8.6 GB, 6.5 and 4.6.
_SAVING: tuple[tuple[str, tuple[Any, ...], Any], ...] = (
    ("dtype", ("float32",), "bfloat16"),
    ("quantization", ("none",), "float8_per_row"),
    ("modulation", ("per_step", "hoisted"), "offloaded"),
    ("float8_text_encoder", (False,), True),
)


def apply(pipe: DiffusionPipeline, recipe: Recipe, packages: PackageStore | None = None) -> dict[str, str]:
    """Change a Flux pipeline (diffusers' FluxPipeline, FluxKontextPipeline, FluxImg2ImgPipeline, ...) in place to run
    as `recipe` says.

    packages: where ahead-of-time packages lie (execution=aoti), by default in the user's cache.
    Returns what was really applied, by field. All is checked first: on an error the pipeline is unchanged. Afterwards
    the pipeline refuses what would go by the recipe (`recipes.guards`).

    Raises:
        RecipeError: the recipe can't be applied on the pipeline's device or to what the pipeline consists of (the
            message names the reason and the nearest recipe that can), one was applied to this pipeline or to its
            transformer before, or it isn't a Flux pipeline.
        OutOfMemoryError: memory ran out while it was applied, which leaves the pipeline half changed.
    """
    if not isinstance(getattr(pipe, "transformer", None), FluxTransformer2DModel):
        raise RecipeError(f"recipes are for Flux pipelines: {type(pipe).__name__} has no FluxTransformer2DModel")
    if applied(pipe) is not None:
        raise RecipeError("a recipe was applied to this pipeline already: load the pipeline again")
    check(recipe, pipe.device, pipe)
    for owner in (pipe, pipe.transformer):  # which other pipelines may share
        setattr(owner, _MARK, recipe)
    names = guards.weight_names(pipe)
    apply_by_field = {o.field: o.apply for o in OPTIMIZATIONS if o.requested(recipe)}
    if "execution" in apply_by_field:
        apply_by_field["execution"] = partial(apply_by_field["execution"], packages=packages or PackageStore())
    with advising("while applying the recipe", lambda: _while_applying(recipe, pipe.device)):
        done = {field: apply_one(pipe, recipe) for field, apply_one in apply_by_field.items()}
    _guard(pipe, recipe, names)
    return done


def _guard(pipe: DiffusionPipeline, recipe: Recipe, names: dict[str, list[str]]) -> None:
    """Let the pipeline refuse what would go by the recipe; `names`: of its weights before it."""
    requested = [o for o in OPTIMIZATIONS if o.requested(recipe)]
    if any(o.merges_weights(recipe) for o in requested):
        guards.refuse_lora(pipe)
    if any(o.hookless(recipe) for o in requested):
        guards.refuse_hooks(pipe, cache=recipe.cuda_graph or recipe.hook_search_removal)
    if any(o.replaces_forward(recipe) for o in requested):
        guards.refuse_copies(pipe)
    guards.refuse_saving(pipe, names)


def applied(pipe: DiffusionPipeline) -> Recipe | None:
    """The recipe that was applied to a pipeline, or to the transformer that it shares; None if none was."""
    return getattr(pipe, _MARK, None) or getattr(pipe.transformer, _MARK, None)


def check(recipe: Recipe, device: torch.device, pipe: DiffusionPipeline | None = None) -> None:
    """Raise RecipeError, with the nearest recipe that can, unless `recipe` can be applied on `device`, to `pipe`."""
    reason = refusal(recipe, device, pipe)
    if reason is not None:
        name, instead = command_line_name(recipe), shlex.quote(command_line_name(nearest(recipe, device, pipe)))
        rung = f"{name}: " if name in named() else ""
        raise RecipeError(f"{rung}{reason}; the nearest recipe that runs here: --recipe {instead}")


def refusal(recipe: Recipe, device: torch.device, pipe: DiffusionPipeline | None = None) -> str | None:
    """Why `recipe` can't run on `device`, in `pipe`; None if it can."""
    return next((reason for o in OPTIMIZATIONS if (reason := o.refusal(recipe, device, pipe))), None)


def not_timed(recipe: Recipe, device: torch.device) -> str | None:
    """Why timing `recipe` on `device` would mean nothing; None if it means something."""
    return next((reason for o in OPTIMIZATIONS if o.requested(recipe) and (reason := o.not_timed(device))), None)


def nearest(recipe: Recipe, device: torch.device, pipe: DiffusionPipeline | None = None) -> Recipe:
    """`recipe` without what `device` and `pipe` refuse, and what the device only emulates."""
    for optimization in OPTIMIZATIONS:
        emulated = optimization.requested(recipe) and optimization.not_timed(device)
        if emulated or optimization.refusal(recipe, device, pipe):
            recipe = recipe.without(optimization.field)
    return recipe


def saving_memory(recipe: Recipe, device: torch.device) -> str | None:
    """The changes of single fields by which `recipe` would take less of `device`'s memory, in words; None if it has all
    that can run there."""
    changes = []
    for field, values, to in _SAVING:
        if getattr(recipe, field) in values:
            changed = replace(recipe, **{field: to})
            if refusal(changed, device) is None and not_timed(changed, device) is None:
                changes.append(f"{field}={str(to).lower()}")
    return f"a recipe with {' or '.join(changes)}" if changes else None


def _while_applying(recipe: Recipe, device: torch.device) -> str:
    saving = saving_memory(recipe, device)
    return f"use {saving}" if saving else "use a device with more memory free"


def is_lossless(recipe: Recipe) -> bool:
    """Whether all of a recipe's optimizations keep the result up to rounding."""
    return all(o.lossless(recipe) for o in OPTIMIZATIONS if o.requested(recipe))


def fastest(device: torch.device, not_paying: Collection[str] = ()) -> Recipe:
    """The ladder's top on `device`: every rung that it supports (not merely emulates), without those `not_paying` and
    those that are for who asks for them (`ladder.NOT_INHERITED`)."""

    def skip(rung: Rung) -> str | None:
        pays_not = "does not pay" if rung.name in not_paying else None
        return pays_not or refusal(rung.recipe, device) or not_timed(rung.recipe, device)

    return [rung.recipe for rung in climb(skip) if rung.skipped is None and rung.inherited][-1]
