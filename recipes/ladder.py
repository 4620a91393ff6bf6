"""The ablation ladder: one function a rung, each changing one field of its parent; and recipes by name."""

from __future__ import annotations

import difflib
import json
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

from recipes.recipe import InductorFlags, Recipe, RecipeError


def fp32(parent: Recipe) -> Recipe:
    """Plain diffusers in float32, with the scheduler's device synchronisation that diffusers once had."""
    return replace(parent, dtype="float32")


def bf16(parent: Recipe) -> Recipe:
    """Weights and activations in bfloat16."""
    return replace(parent, dtype="bfloat16")


def no_scheduler_sync(parent: Recipe) -> Recipe:
    """The scheduler no longer waits for the device at the first step."""
    return replace(parent, scheduler_sync_removal=True)


def compiled(parent: Recipe) -> Recipe:
    """torch.compile, fullgraph, of the transformer's blocks and the VAE's decoder."""
    return replace(parent, execution="compile")


def max_autotune(parent: Recipe) -> Recipe:
    """Inductor's search over GEMM and convolution kernels. Later rungs are without it."""
    return replace(parent, max_autotune=True)


def fused_qkv(parent: Recipe) -> Recipe:
    """One GEMM for query, key and value."""
    return replace(parent, fused_qkv=True)


def channels_last(parent: Recipe) -> Recipe:
    """channels_last memory format in the VAE."""
    return replace(parent, channels_last=True)


def fa3_fp8(parent: Recipe) -> Recipe:
    """FlashAttention-3 in float8."""
    return replace(parent, attention="fa3_fp8")


def float8(parent: Recipe) -> Recipe:
    """float8 weights and dynamic float8 activations, a scale per row, in the blocks' Linears."""
    return replace(parent, quantization="float8_per_row")


def inductor_flags(parent: Recipe) -> Recipe:
    """1x1 convolutions as GEMMs, no epilogue fusion, coordinate descent in all directions. Later rungs: without."""
    flags = InductorFlags(
        conv_1x1_as_mm=True,
        epilogue_fusion=False,
        coordinate_descent_tuning=True,
        coordinate_descent_check_all_directions=True,
    )
    return replace(parent, inductor_flags=flags)


def cuda_graph(parent: Recipe) -> Recipe:
    """A denoising step is one CUDA graph, launched at once; so is the VAE's decoder."""
    return replace(parent, cuda_graph=True)


def hoisted_modulation(parent: Recipe) -> Recipe:
    """The AdaLN modulation of all steps computed once before the loop, as one GEMM a Linear."""
    return replace(parent, modulation="hoisted")


def hoisted_embeddings(parent: Recipe) -> Recipe:
    """Prompt embedding and rotary table computed once before the loop."""
    return replace(parent, hoisted_embeddings=True)


def compiled_text_encoders(parent: Recipe) -> Recipe:
    """torch.compile of CLIP and T5; each one CUDA graph, where the recipe has these."""
    return replace(parent, compiled_text_encoders=True)


def float8_text_encoder(parent: Recipe) -> Recipe:
    """float8 weights and dynamic float8 activations in T5's Linears: 4.6 GB less."""
    return replace(parent, float8_text_encoder=True)


def fused_kernels(parent: Recipe) -> Recipe:
    """Triton kernels for what Inductor leaves apart: AdaLN, GELU, QK norm and rotary, each with its float8 cast."""
    return replace(parent, fused_kernels=True)


def fused_group_norm(parent: Recipe) -> Recipe:
    """A Triton kernel for GroupNorm and SiLU in the VAE's decoder."""
    return replace(parent, fused_group_norm=True)


def device_postprocessing(parent: Recipe) -> Recipe:
    """Pixels are rounded to bytes on the GPU, and not on the host after copying twice as much."""
    return replace(parent, device_postprocessing=True)


def float8_attention(parent: Recipe) -> Recipe:
    """Attention in float8 by cuDNN."""
    return replace(parent, attention="cudnn_fp8")


def vae_attention(parent: Recipe) -> Recipe:
    """The VAE's attention, one head of 512 channels, as two GEMMs and a softmax."""
    return replace(parent, vae_attention="gemm")


def no_hook_search(parent: Recipe) -> Recipe:
    """The pipeline no longer looks through the models' modules for hooks at every call."""
    return replace(parent, hook_search_removal=True)


def early_preparation(parent: Recipe) -> Recipe:
    """The host prepares the loop while the GPU encodes the prompt, instead of waiting for it at each copy."""
    return replace(parent, early_preparation=True)


def wgmma_attention(parent: Recipe) -> Recipe:
    """Attention in float8 by our own kernel for Hopper's tensor cores instead of cuDNN's."""
    return replace(parent, attention="wgmma_fp8")


def gemm_epilogues(parent: Recipe) -> Recipe:
    """GELU, QK norm, rotary embedding and gated residual, with their casts, in the epilogue of the GEMM before them."""
    return replace(parent, gemm_epilogues=True)


def int8_adaln(parent: Recipe) -> Recipe:
    """int8 instead of float8 for the Linears that take an AdaLN's rows: query, key and value, and the MLP's first."""
    return replace(parent, int8_adaln=True)


def loop_graph(parent: Recipe) -> Recipe:
    """All denoising steps are one CUDA graph; step ms is the loop's time by steps. Later rungs are without it."""
    return replace(parent, loop_graph=True)


def aoti(parent: Recipe) -> Recipe:
    """Ahead-of-time compiled packages instead of compiling at the first call."""
    return replace(parent, execution="aoti")


# Up to inductor_flags, and with aoti, the optimizations of huggingface/flux-fast.
LADDER: tuple[Callable[[Recipe], Recipe], ...] = (
    fp32,
    bf16,
    no_scheduler_sync,
    compiled,
    max_autotune,
    fused_qkv,
    channels_last,
    fa3_fp8,
    float8,
    inductor_flags,
    cuda_graph,
    hoisted_modulation,
    hoisted_embeddings,
    compiled_text_encoders,
    float8_text_encoder,
    fused_kernels,
    fused_group_norm,
    device_postprocessing,
    float8_attention,
    vae_attention,
    no_hook_search,
    early_preparation,
    wgmma_attention,
    gemm_epilogues,
    int8_adaln,
    loop_graph,
    aoti,
)
# Measured, and not inherited, for they cost what their gain must be worth to who asks for them: a search of minutes at
# each compilation (at FLUX.1's sizes cuBLASLt wins most of it), or callbacks between steps.
NOT_INHERITED = (max_autotune, inductor_flags, loop_graph)
# Fields that are written as JSON, with an example of each.
_NESTED = {"inductor_flags": '{"epilogue_fusion":false}', "cache": '{"speed_factor":2}'}


@dataclass(frozen=True)
class Rung:
    """A rung as climbed. Its field isn't inherited by those after it if it is `skipped` (why), or not `inherited`."""

    name: str
    parent: str | None
    recipe: Recipe
    skipped: str | None = None
    inherited: bool = True


def climb(skip: Callable[[Rung], str | None]) -> Iterator[Rung]:
    """The ladder's rungs from the bottom, each on top of the last one that was inherited and not skipped.

    skip(rung): why the rung is to be skipped, or None. A rung that its parent leaves without meaning (a compiler's
    option where compiling was skipped) is skipped as well.
    """
    parent, below = None, Recipe()
    for change in LADDER:
        try:
            rung = Rung(change.__name__, parent, change(below), inherited=change not in NOT_INHERITED)
            rung = replace(rung, skipped=skip(rung))
        except RecipeError as error:
            rung = Rung(change.__name__, parent, below, str(error))
        yield rung
        if rung.skipped is None and rung.inherited:
            parent, below = rung.name, rung.recipe


def named() -> dict[str, Recipe]:
    """The whole ladder's recipes by name, from the baseline to the fastest."""
    return {rung.name: rung.recipe for rung in climb(lambda rung: None)}


def description(name: str) -> str:
    """What a rung does, in one sentence."""
    (change,) = (change for change in LADDER if change.__name__ == name)
    return (change.__doc__ or "").strip()


def parse(text: str) -> Recipe:
    """A recipe from the command line: a rung's name, fields after it as in "float8,attention=native".

    A nested field is written as JSON: `inductor_flags={"epilogue_fusion":false}`, `cache={"speed_factor":2}`.

    Raises:
        RecipeError: unknown name, field or value.
    """
    name, *changes = (part.strip() for part in _split(text))
    recipes = named()
    if name not in recipes:
        close = difflib.get_close_matches(name, recipes, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise RecipeError(f"unknown recipe {name!r}: {hint}There are {', '.join(recipes)}")
    values = dict(_parse_change(change) for change in changes)
    return Recipe.from_dict({**recipes[name].to_dict(), **values})


def _split(text: str) -> list[str]:
    """At commas outside braces."""
    parts, depth = [""], 0
    for character in text:
        depth += (character == "{") - (character == "}")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def _parse_change(change: str) -> tuple[str, Any]:
    name, equals, value = change.partition("=")
    hints = typing.get_type_hints(Recipe)
    if not equals or name not in hints:
        close = difflib.get_close_matches(name, hints, n=1)
        hint = f"did you mean {close[0]}? " if close and equals else ""
        fault = f"unknown field {name!r}" if equals else f"{change!r} is not FIELD=VALUE"
        raise RecipeError(f"{fault}: {hint}The fields are {', '.join(hints)}")
    if value in ("true", "false", "null"):
        return name, json.loads(value)
    if name not in _NESTED:
        return name, value
    try:
        return name, dict(json.loads(value))
    except (TypeError, ValueError):
        raise RecipeError(
            f"{name} takes a JSON object of its fields, as {name}={_NESTED[name]}, not {value!r}"
        ) from None


def command_line_name(recipe: Recipe) -> str:
    """The shortest text that `parse` turns into `recipe`."""
    base, known = min(named().items(), key=lambda item: len(item[1].differences(recipe)))
    changes = [base]
    for name in known.differences(recipe):
        value = getattr(recipe, name)
        if is_dataclass(value):  # what is left out is at its default
            value = {f.name: x for f in fields(value) if (x := getattr(value, f.name)) != f.default}
        changes.append(f"{name}={value if isinstance(value, str) else json.dumps(value, separators=(',', ':'))}")
    return ",".join(changes)
