"""The recipe as a value: what it accepts, and its hash."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, replace

import pytest

from recipes import FirstBlockCache, InductorFlags, Recipe, RecipeError, StepSkipping
from recipes.recipe import default


def test_frozen_and_usable_as_key() -> None:
    recipe = Recipe()
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.dtype = "bfloat16"  # type: ignore[misc]
    assert {recipe: 1}[Recipe()] == 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dtype": "float16"}, "dtype is one of float32, bfloat16, not 'float16'"),
        ({"execution": "jit"}, "execution is one of eager, compile, aoti"),
        (
            {"attention": True},
            "attention is one of native, cudnn, fa3, fa3_fp8, cudnn_fp8, triton_fp8, wgmma_fp8, not True",
        ),
        ({"quantization": "int8"}, "quantization is one of"),
        ({"fused_qkv": "yes"}, "fused_qkv is true or false, not 'yes'"),
        ({"fused_qkv": 1}, "fused_qkv is true or false, not 1"),
        ({"fused_group_norm": True}, "fused_group_norm needs channels_last=true"),
        ({"fused_kernels": True, "fused_qkv": True}, "fused_kernels needs dtype=bfloat16"),
        ({"fused_kernels": True, "dtype": "bfloat16"}, "fused_kernels needs fused_qkv=true"),
        (
            {"fused_kernels": True, "dtype": "bfloat16", "fused_qkv": True, "quantization": "float8_per_tensor"},
            "fused_kernels needs quantization=none or float8_per_row",
        ),
        ({"channels_last": None}, "channels_last is true or false"),
        ({"execution": "compile", "inductor_flags": None}, "inductor_flags takes a JSON object"),
        ({"cache": True}, "cache is null or a JSON object"),
        ({"max_autotune": True}, "max_autotune has no effect with execution=eager"),
        ({"compile_scope": "whole"}, "compile_scope has no effect with execution=eager"),
        ({"inductor_flags": InductorFlags(epilogue_fusion=False)}, "inductor_flags has no effect"),
        ({"execution": "compile", "cache": FirstBlockCache()}, "cache with a threshold needs execution=eager"),
        ({"execution": "aoti", "cache": FirstBlockCache()}, r'or skip steps with cache={"speed_factor":2}$'),
        ({"cuda_graph": True, "cache": FirstBlockCache()}, "cache with a threshold needs cuda_graph=false"),
        ({"hook_search_removal": True, "cache": FirstBlockCache()}, "needs hook_search_removal=false: it is a hook"),
        ({"loop_graph": True, "scheduler_sync_removal": True}, "loop_graph needs cuda_graph=true"),
        ({"loop_graph": True, "cuda_graph": True}, "loop_graph needs scheduler_sync_removal=true"),
        ({"modulation": True}, "modulation is one of per_step, hoisted, offloaded, not True"),
        ({"compiled_text_encoders": True}, "compiled_text_encoders has no effect with execution=eager"),
    ],
)
def test_refuses(changes: dict, words: str) -> None:
    with pytest.raises(RecipeError, match=words) as raised:
        Recipe(**changes)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("threshold", [-0.1, float("nan"), float("inf"), "0.1", True, None])
def test_refuses_cache_thresholds(threshold: object) -> None:
    with pytest.raises(RecipeError, match="threshold"):
        FirstBlockCache(threshold)  # type: ignore[arg-type]


@pytest.mark.parametrize("speed_factor", [0.99, 0, -2, float("nan"), float("inf"), 10**400, "2", True, None])
def test_refuses_speed_factors(speed_factor: object) -> None:
    with pytest.raises(RecipeError, match=r"cache: speed_factor is (1 or more|a number), not"):
        StepSkipping(speed_factor)  # type: ignore[arg-type]


def test_skipped_steps_go_with_all_that_runs() -> None:
    for more in ({"execution": "compile"}, {"execution": "aoti", "hook_search_removal": True}):
        Recipe(scheduler_sync_removal=True, cuda_graph=True, loop_graph=True, cache=StepSkipping(2), **more)


def test_refuses_inductor_flags_that_are_not_boolean() -> None:
    with pytest.raises(RecipeError, match="epilogue_fusion is true, false or null, not 1"):
        InductorFlags(epilogue_fusion=1)  # type: ignore[arg-type]


def test_hash_differs_for_every_field() -> None:
    compiled = Recipe(execution="compile")
    in_float8 = {"dtype": "bfloat16", "fused_qkv": True, "fused_kernels": True}
    in_float8 |= {"quantization": "float8_per_row", "attention": "wgmma_fp8"}
    variants = [
        Recipe(),
        Recipe(dtype="bfloat16"),
        Recipe(scheduler_sync_removal=True),
        compiled,
        Recipe(execution="aoti"),
        replace(compiled, compile_scope="whole"),
        replace(compiled, max_autotune=True),
        replace(compiled, inductor_flags=InductorFlags(epilogue_fusion=False)),
        replace(compiled, inductor_flags=InductorFlags(epilogue_fusion=True)),
        Recipe(fused_qkv=True),
        Recipe(channels_last=True),
        Recipe(dtype="bfloat16", fused_qkv=True, fused_kernels=True),
        Recipe(**in_float8, gemm_epilogues=True),
        Recipe(**in_float8, gemm_epilogues=True, int8_adaln=True),
        Recipe(channels_last=True, fused_group_norm=True),
        Recipe(vae_attention="gemm"),
        Recipe(hook_search_removal=True),
        Recipe(early_preparation=True),
        Recipe(attention="cudnn"),
        Recipe(attention="fa3"),
        Recipe(attention="fa3_fp8"),
        Recipe(attention="cudnn_fp8"),
        Recipe(attention="triton_fp8"),
        Recipe(attention="wgmma_fp8"),
        Recipe(quantization="float8_per_row"),
        Recipe(quantization="float8_per_tensor"),
        Recipe(cache=FirstBlockCache()),
        Recipe(cache=FirstBlockCache(0.2)),
        Recipe(cache=StepSkipping(2)),
        Recipe(cache=StepSkipping(1.5)),
        Recipe(modulation="hoisted"),
        Recipe(modulation="offloaded"),
        Recipe(hoisted_embeddings=True),
        replace(compiled, compiled_text_encoders=True),
        Recipe(float8_text_encoder=True),
        Recipe(device_postprocessing=True),
        Recipe(cuda_graph=True),
        Recipe(cuda_graph=True, scheduler_sync_removal=True),
        Recipe(cuda_graph=True, scheduler_sync_removal=True, loop_graph=True),
    ]
    changed = {name for recipe in variants for name in recipe.differences(Recipe())}
    assert changed == {field.name for field in dataclasses.fields(Recipe)}, "a field is missing from this test"
    assert len({recipe.hash for recipe in variants}) == len(variants)


def test_equal_recipes_have_equal_hashes() -> None:
    assert Recipe(cache=StepSkipping(2)).hash == Recipe(cache=StepSkipping(2.0)).hash
    assert Recipe(cache=FirstBlockCache(0)).hash == Recipe(cache=FirstBlockCache(0.0)).hash
    assert Recipe(fused_qkv=True, dtype="bfloat16").hash == Recipe(dtype="bfloat16", fused_qkv=True).hash


def test_hash_survives_a_new_field() -> None:
    """Result files of before a field was added still belong to their recipes: the hash is written out here."""

    @dataclass(frozen=True)
    class Later(Recipe):
        some_new_option: bool = False

    recipe = replace(Recipe(), dtype="bfloat16", fused_qkv=True)
    assert Later(dtype="bfloat16", fused_qkv=True).hash == recipe.hash
    assert recipe.hash == "dca9444af650"


def test_without_puts_back_the_default_and_what_depends_on_it() -> None:
    options = {"max_autotune": True, "compile_scope": "whole", "compiled_text_encoders": True}
    recipe = Recipe(dtype="bfloat16", execution="compile", fused_qkv=True, **options)
    assert recipe.without("fused_qkv") == replace(recipe, fused_qkv=default("fused_qkv"))
    assert recipe.without("execution") == Recipe(dtype="bfloat16", fused_qkv=True)
    fused = Recipe(dtype="bfloat16", fused_qkv=True, fused_kernels=True)
    assert fused.without("fused_qkv") == Recipe(dtype="bfloat16")
    assert fused.without("dtype") == Recipe(fused_qkv=True)
    assert Recipe(channels_last=True, fused_group_norm=True).without("channels_last") == Recipe()
    loop = Recipe(scheduler_sync_removal=True, cuda_graph=True, loop_graph=True)
    assert loop.without("cuda_graph") == Recipe(scheduler_sync_removal=True)
    assert loop.without("scheduler_sync_removal") == Recipe(cuda_graph=True)


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(),
        Recipe(dtype="bfloat16", cache=FirstBlockCache(0.25), modulation="hoisted"),
        Recipe(execution="aoti", cache=StepSkipping(1.5)),
        Recipe(execution="compile", inductor_flags=InductorFlags(epilogue_fusion=False), cuda_graph=True),
    ],
)
def test_comes_back_from_json(recipe: Recipe) -> None:
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe
    assert Recipe.from_dict({n: v for n, v in recipe.to_dict().items() if n in recipe.differences(Recipe())}) == recipe


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"colour": "red"}, "a recipe has no field 'colour'"),
        ({"cache": {"limit": 1}}, "cache takes a JSON object of its fields"),
        ({"cache": {"threshold": -1}}, "threshold is 0 or more"),
        ({"cache": {"speed_factor": 0.5}}, "speed_factor is 1 or more"),
        ({"cache": {"speed_factor": 2, "threshold": 0.1}}, r"of its fields \(threshold; or speed_factor\), not"),
        ({"inductor_flags": {"fuse": True}}, r"of its fields \(conv_1x1_as_mm, epilogue_fusion, "),
        ({"inductor_flags": {"epilogue_fusion": 1}}, "true, false or null"),
        ({"inductor_flags": None}, "inductor_flags takes a JSON object"),
        ({"dtype": "float16"}, "dtype is one of"),
    ],
)
def test_from_dict_refuses(values: dict, words: str) -> None:
    with pytest.raises(RecipeError, match=words) as raised:
        Recipe.from_dict(values)
    assert "\n" not in str(raised.value)
