"""Recipes that a GPU can't run are refused in words, with the nearest one that it can; what PyTorch says of the GPU is
patched."""

from __future__ import annotations

import re
import shlex
import typing
from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import pytest
import torch

import recipes
from recipes import FirstBlockCache, Recipe, RecipeError
from recipes.apply import OPTIMIZATIONS

CUDA, CPU = torch.device("cuda"), torch.device("cpu")

# All that an A100 lacks: the change to bf16, and the compute capability that it needs.
ABOVE_AN_A100 = {
    "quantization=float8_per_row": "8.9",
    "quantization=float8_per_tensor": "8.9",
    "float8_text_encoder=True": "8.9",
    "attention=triton_fp8": "8.9",
    "attention=cudnn_fp8": "9.0",
    "attention=wgmma_fp8": "9.0 to below 10.0",
    "attention=fa3": "9.0 to below 10.0",
    "attention=fa3_fp8": "9.0 to below 10.0",
}


def every_value() -> list[Recipe]:
    """bf16 with each field in turn at each of its values, and what that value asks of the others."""
    for_epilogues = {
        **{"fused_qkv": True, "fused_kernels": True},
        **{"quantization": "float8_per_row", "attention": "wgmma_fp8"},
    }
    asked = {
        "fused_kernels": {"fused_qkv": True},
        "gemm_epilogues": for_epilogues,
        "int8_adaln": {**for_epilogues, "gemm_epilogues": True},
        "fused_group_norm": {"channels_last": True},
        "loop_graph": {"cuda_graph": True, "scheduler_sync_removal": True},
        "compiled_text_encoders": {"execution": "compile"},
    }
    hints = typing.get_type_hints(Recipe)
    found = []
    for field in (optimization.field for optimization in OPTIMIZATIONS):
        literal = typing.get_origin(hints[field]) is Literal
        on = typing.get_args(hints[field]) if literal else (FirstBlockCache() if field == "cache" else True,)
        found += [replace(Recipe(dtype="bfloat16"), **{**asked.get(field, {}), field: value}) for value in on]
    return found


def test_all_that_needs_more_than_an_a100_is_known_here(pretend_gpu: Callable) -> None:
    pretend_gpu((8, 0), "NVIDIA A100-SXM4-80GB")
    refused = {reason.partition(" needs ")[0] for r in every_value() if (reason := recipes.refusal(r, CUDA))}
    assert refused == set(ABOVE_AN_A100)


@pytest.mark.parametrize("change", ABOVE_AN_A100)
def test_words_on_an_a100(pretend_gpu: Callable, change: str) -> None:
    pretend_gpu((8, 0), "NVIDIA A100-SXM4-80GB")
    asked = recipes.parse(f"bf16,{change}".replace("True", "true"))
    with pytest.raises(RecipeError) as raised:
        recipes.check(asked, CUDA)
    assert str(raised.value) == (
        f"{change} needs compute capability {ABOVE_AN_A100[change]}, NVIDIA A100-SXM4-80GB has 8.0; "
        "the nearest recipe that runs here: --recipe bf16"
    )


@pytest.mark.parametrize("name", recipes.named())
def test_what_is_named_instead_of_a_rung_runs(pretend_gpu: Callable, name: str) -> None:
    pretend_gpu((8, 0), "NVIDIA A100-SXM4-80GB")
    rung = recipes.named()[name]
    lossy = not recipes.is_lossless(rung)  # the ladder's lossy rungs are those in float8
    assert (recipes.refusal(rung, CUDA) is not None) == lossy
    if not lossy:
        return
    with pytest.raises(RecipeError, match=r"needs compute capability .*, NVIDIA A100.* has 8\.0; ") as raised:
        recipes.check(rung, CUDA)
    (text,) = shlex.split(str(raised.value).partition("--recipe ")[2])
    instead = recipes.parse(text)
    recipes.check(instead, CUDA)
    lost = {"attention", "quantization", "float8_text_encoder", "gemm_epilogues", "int8_adaln"}
    kept = set(rung.differences(Recipe())) - lost
    assert set(instead.differences(Recipe())) == kept, "all else is as it was asked for"


# What each package is needed for, on an H100.
COMPILING = {"execution=compile", "execution=aoti", "compiled_text_encoders=True"}
NEEDED_FOR = {
    ("torchao",): {"quantization=float8_per_row", "quantization=float8_per_tensor", "float8_text_encoder=True"},
    ("cudnn",): {"attention=cudnn_fp8"},
    ("flash_attn_interface", "kernels"): {"attention=fa3", "attention=fa3_fp8"},
    ("triton",): {"fused_kernels=True", "fused_group_norm=True", "attention=triton_fp8", *COMPILING},
    ("cuda.bindings",): {"attention=wgmma_fp8"},
}


@pytest.mark.parametrize("packages", NEEDED_FOR, ids=" or ".join)
def test_words_where_a_package_is_missing(pretend_gpu: Callable, packages: tuple[str, ...]) -> None:
    pretend_gpu((9, 0), "NVIDIA H100 80GB HBM3", without=packages)
    reasons = {reason for recipe in every_value() if (reason := recipes.refusal(recipe, CUDA))}
    assert {reason.partition(" needs ")[0] for reason in reasons} == NEEDED_FOR[packages]
    names = " or ".join(package.replace("cuda.bindings", "cuda-bindings") for package in packages)
    assert all(re.search(f"package {names}, .*(not|n't) installed", reason) for reason in reasons)


def test_a_rung_is_named_with_what_it_lacks(pretend_gpu: Callable) -> None:
    pretend_gpu((9, 0), "NVIDIA H100 80GB HBM3", without=("torchao",))
    with pytest.raises(RecipeError) as raised:
        recipes.check(recipes.parse("float8,attention=native"), CUDA)
    assert str(raised.value).startswith("quantization=float8_per_row needs the package torchao, not installed ")
    with pytest.raises(RecipeError) as raised:
        recipes.check(recipes.parse("float8_attention"), CUDA)
    assert str(raised.value).startswith("float8_attention: quantization=float8_per_row needs the package torchao, not ")
    instead = recipes.parse(shlex.split(str(raised.value).partition("--recipe ")[2])[0])
    recipes.check(instead, CUDA)
    assert instead.attention == "cudnn_fp8"


@pytest.mark.parametrize("attention", ["fa3", "fa3_fp8"])
def test_flash_attention_3_is_for_hopper_alone(pretend_gpu: Callable, attention: str) -> None:
    pretend_gpu((10, 0), "NVIDIA B200")
    words = (
        rf"attention={attention} needs compute capability 9\.0 to below 10\.0, NVIDIA B200 has 10\.0; .*--recipe bf16$"
    )
    with pytest.raises(RecipeError, match=words):
        recipes.check(recipes.parse(f"bf16,attention={attention}"), CUDA)


NOT_IN_FLOAT32 = ["attention=cudnn", "attention=fa3", "quantization=float8_per_row", "float8_text_encoder=True"]


@pytest.mark.parametrize("change", NOT_IN_FLOAT32)
def test_float32_where_the_kernels_take_none(pretend_gpu: Callable, change: str) -> None:
    pretend_gpu((9, 0), "NVIDIA H100 80GB HBM3")
    text = change.replace("True", "true")
    with pytest.raises(RecipeError) as raised:
        recipes.check(recipes.parse(f"fp32,{text}"), CUDA)
    assert str(raised.value) == (
        f"{change} needs dtype=bfloat16 on a GPU, this is float32; the nearest recipe that runs here: --recipe fp32"
    )
    recipes.check(recipes.parse(f"bf16,{text}"), CUDA)
    if not text.startswith("attention"):
        recipes.check(recipes.parse(f"fp32,{text}"), CPU)


def test_float32_is_refused_nowhere_else(pretend_gpu: Callable) -> None:
    pretend_gpu((9, 0), "NVIDIA H100 80GB HBM3")
    refused = set()
    for recipe in every_value():
        if recipe.dtype == "bfloat16" and not recipe.fused_kernels:  # which is refused by the recipe itself
            assert recipes.refusal(recipe, CUDA) is None
            reason = recipes.refusal(replace(recipe, dtype="float32"), CUDA)
            refused |= {reason.partition(" needs ")[0]} if reason else set()
    assert refused == set(NOT_IN_FLOAT32)
