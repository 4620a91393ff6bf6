"""No compiled kernel reads back what another warp of it has just stored."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from diffusers import FluxTransformer2DModel
from torch._inductor.utils import run_and_get_code

import recipes
from recipes import Recipe
from tests.recipes.triton_code import reading_back

CUDA = torch.device("cuda")
COMPILED = Recipe(dtype="bfloat16", execution="compile", compiled_text_encoders=True)
IN_FLOAT8 = replace(COMPILED, float8_text_encoder=True, quantization="float8_per_row", fused_qkv=True)

KERNEL = """
def triton_red_fused_0(in_ptr0, out_ptr0, out_ptr1, xnumel, r0_numel, XBLOCK : tl.constexpr):
    for r0_offset in tl.range(0, r0_numel, R0_BLOCK):
        tmp0 = tl.load(in_ptr0 + (r0_1 + 256*x0), r0_mask)
        _tmp1 = triton_helpers.maximum(_tmp1, tmp0)
        {first}
    {between}
    for r0_offset in tl.range(0, r0_numel, R0_BLOCK):
        {second}
        tl.store(out_ptr1 + (r0_1 + 256*x0), tmp2.to(tl.float8e4nv), r0_mask)
"""
STORE, LOAD = (
    "tl.store(out_ptr0 + (r0_1 + 256*x0), tmp0, r0_mask)",
    "tmp2 = tl.load(out_ptr0 + (r0_1 + 256*x0), r0_mask)",
)


@pytest.mark.parametrize(
    ("first", "between", "second", "found"),
    [
        (STORE, "tmp3 = x0", LOAD, ["triton_red_fused_0 reads out_ptr0"]),
        (STORE, "tl.debug_barrier()", LOAD, []),
        (STORE, "tmp1 = triton_helpers.max2(_tmp1, 1)[:, None]", LOAD, []),
        (STORE, "tmp3 = x0", "tmp2 = tl.load(in_ptr0 + (r0_1 + 256*x0), r0_mask)", []),
        ("tmp3 = x0", "tmp3 = x0", LOAD, []),
    ],
)
def test_kernels_that_read_back_are_found(first: str, between: str, second: str, found: list[str]) -> None:
    assert reading_back(KERNEL.format(first=first, between=between, second=second)) == found


def test_code_without_kernels_is_no_answer() -> None:
    with pytest.raises(ValueError, match="no Triton kernel"):
        reading_back("def call(args): pass")


def kernels_reading_back(call: Callable) -> tuple[int, list[str]]:
    """How many graphs `call` compiles, and the kernels of theirs that read back."""
    with torch.no_grad(), torch._inductor.config.patch(force_disable_caches=True):
        _, codes = run_and_get_code(call)
    return len(codes), [kernel for code in codes for kernel in reading_back(code)]


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", [COMPILED, IN_FLOAT8], ids=["bfloat16", "float8"])
def test_text_encoders(tiny: Callable, recipe: Recipe) -> None:
    pipe = tiny(torch.bfloat16, CUDA)
    recipes.apply(pipe, recipe)
    found = kernels_reading_back(partial(pipe.encode_prompt, ["two blue squares"] * 50, None))
    assert found == (3, []), "CLIP's layer, T5's first and T5's others"


@pytest.mark.gpu
@pytest.mark.parametrize("scope", ["regional", "whole"])
@pytest.mark.parametrize("recipe", [COMPILED, IN_FLOAT8], ids=["bfloat16", "float8"])
def test_blocks_of_full_width(tiny: Callable, predict: Callable, recipe: Recipe, scope: str) -> None:
    """Of 3072 columns, as no kernel has them at once."""
    pipe = tiny(torch.bfloat16, CUDA)
    wide = {**pipe.transformer.config, "num_layers": 1, "num_single_layers": 1, "num_attention_heads": 24}
    pipe.register_modules(transformer=FluxTransformer2DModel.from_config(wide).to(CUDA, torch.bfloat16))
    recipes.apply(pipe, replace(recipe, compile_scope=scope))
    # Of 8 rows and 12288 columns cuBLAS multiplies nothing in float8.
    graphs, found = kernels_reading_back(partial(predict, pipe, side=32, text_tokens=64))
    assert graphs == (2 if scope == "regional" else 1)
    assert found == []
