"""The ladder, climbing it, and recipes by name."""

from __future__ import annotations

import itertools
from dataclasses import fields, replace

import pytest

from recipes import (
    LADDER,
    FirstBlockCache,
    InductorFlags,
    Recipe,
    RecipeError,
    Rung,
    StepSkipping,
    climb,
    command_line_name,
    named,
    parse,
)
from recipes.ladder import NOT_INHERITED, description

NAMES = [change.__name__ for change in LADDER]
INHERITED = [change.__name__ for change in LADDER if change not in NOT_INHERITED]


def climbed(*skipped: str) -> dict[str, Rung]:
    return {rung.name: rung for rung in climb(lambda rung: "not here" if rung.name in skipped else None)}


def test_each_rung_changes_one_field_of_its_parent() -> None:
    rungs = climbed()
    assert list(rungs) == NAMES
    for name, rung in rungs.items():
        parent = Recipe() if rung.parent is None else rungs[rung.parent].recipe
        differences = rung.recipe.differences(parent)
        # The first is the plain recipe itself.
        assert len(differences) == (0 if name == NAMES[0] else 1), f"{name} changes {differences}"
        below = [other for other in NAMES[: NAMES.index(name)] if other in INHERITED]
        assert rung.parent == (None if name == NAMES[0] else below[-1])
        assert description(name).endswith(".")


@pytest.mark.parametrize("name", NAMES[1:])
def test_skipped_rung_is_not_inherited(name: str) -> None:
    full, rungs = climbed(), climbed(name)
    (field,) = full[name].recipe.differences(full[full[name].parent].recipe)
    before = getattr(full[full[name].parent].recipe, field)
    assert rungs[name].skipped == "not here"
    assert getattr(rungs[name].recipe, field) != before, "the skipped rung still says what it would have been"
    for after in NAMES[NAMES.index(name) + 1 :]:
        if field in full[after].recipe.differences(full[full[after].parent].recipe) and not rungs[after].skipped:
            break  # a later rung sets the field anew
        assert getattr(rungs[after].recipe, field) == before
        assert rungs[after].parent != name
    following = NAMES[NAMES.index(name) + 1 :]
    if following and rungs[following[0]].skipped is None:
        assert rungs[following[0]].parent == full[name].parent


def test_rungs_for_who_asks_for_them_are_not_inherited() -> None:
    rungs = climbed()
    assert [name for name, rung in rungs.items() if not rung.inherited] == [
        "max_autotune", "inductor_flags", "loop_graph",
    ]  # fmt: skip
    for name in ("max_autotune", "inductor_flags"):
        (field,) = rungs[name].recipe.differences(rungs[rungs[name].parent].recipe)
        plain = getattr(Recipe(), field)
        assert [other for other, rung in rungs.items() if getattr(rung.recipe, field) != plain] == [name]
    assert [name for name, rung in rungs.items() if rung.recipe.loop_graph] == ["loop_graph"]
    assert rungs["loop_graph"].parent == rungs["aoti"].parent == "int8_adaln"
    without = climbed("cuda_graph")["loop_graph"]
    assert without.skipped == "loop_graph needs cuda_graph=true"
    assert not without.recipe.loop_graph


def test_compiler_options_are_skipped_where_compiling_was() -> None:
    rungs = climbed("compiled")
    skipped = {name: rung.skipped for name, rung in rungs.items() if rung.skipped}
    assert set(skipped) == {"compiled", "max_autotune", "inductor_flags", "compiled_text_encoders"}
    assert "no effect with execution=eager" in skipped["max_autotune"]
    assert rungs["fused_qkv"].parent == "no_scheduler_sync"
    assert rungs["fused_qkv"].recipe.execution == "eager"
    assert rungs["aoti"].recipe.execution == "aoti"


def many_recipes() -> list[Recipe]:
    """Every valid combination of some values of every field but the booleans that go with all others, one by one."""
    values: dict[str, tuple] = {
        "dtype": ("float32", "bfloat16"),
        "scheduler_sync_removal": (False, True),
        "execution": ("eager", "compile", "aoti"),
        "compile_scope": ("regional", "whole"),
        "max_autotune": (False, True),
        "fused_qkv": (False, True),
        "channels_last": (False, True),
        "attention": ("native", "cudnn", "fa3_fp8"),
        "quantization": ("none", "float8_per_tensor"),
        "fused_kernels": (False, True),
        "fused_group_norm": (False, True),
        "vae_attention": ("native", "gemm"),
        "inductor_flags": (InductorFlags(), InductorFlags(epilogue_fusion=True, conv_1x1_as_mm=False)),
        "cache": (None, FirstBlockCache(0.125), StepSkipping(1.5)),
        "modulation": ("per_step", "offloaded"),
    }
    one_by_one = (
        "hoisted_embeddings", "compiled_text_encoders", "float8_text_encoder", "device_postprocessing", "cuda_graph",
        "hook_search_removal", "early_preparation",
    )  # fmt: skip
    assert {*values, *one_by_one, "loop_graph", "gemm_epilogues", "int8_adaln"} == {
        field.name for field in fields(Recipe)
    }
    recipes = []
    for combination in itertools.product(*values.values()):
        try:
            recipes.append(Recipe(**dict(zip(values, combination, strict=True))))
        except RecipeError:
            continue
    compiled = [recipe for recipe in recipes if recipe.execution == "compile"]
    loops = [replace(r, scheduler_sync_removal=True, cuda_graph=True, loop_graph=True) for r in compiled[::7]]
    in_float8 = {"quantization": "float8_per_row", "attention": "wgmma_fp8", "gemm_epilogues": True}
    fused = [replace(r, **in_float8) for r in compiled[::5] if r.fused_kernels]
    fused += [replace(r, int8_adaln=True) for r in fused]
    return recipes + [replace(r, **{name: True}) for name in one_by_one for r in compiled[::5]] + loops + fused


def test_every_recipe_has_a_name_that_parses_back() -> None:
    assert all(command_line_name(recipe) == name and parse(name) == recipe for name, recipe in named().items())
    recipes = many_recipes()
    assert len(recipes) > 1000
    texts = {command_line_name(recipe) for recipe in recipes[::7]}
    assert len(texts) == len(recipes[::7])
    assert [parse(command_line_name(recipe)) for recipe in recipes[::7]] == recipes[::7]


def test_parse_reads_every_kind_of_value() -> None:
    text = 'max_autotune, fused_qkv=true,attention=cudnn,inductor_flags={"epilogue_fusion":false,"conv_1x1_as_mm":null}'
    expected = replace(
        named()["max_autotune"],
        fused_qkv=True,
        attention="cudnn",
        inductor_flags=InductorFlags(epilogue_fusion=False),
    )
    assert parse(text) == expected
    assert parse('bf16,cache={"threshold":0.25}').cache == FirstBlockCache(0.25)
    assert parse('aoti,cache={"speed_factor":2}').cache == StepSkipping(2.0)
    assert command_line_name(parse('aoti,cache={"speed_factor":2}')) == 'aoti,cache={"speed_factor":2.0}'
    assert parse('bf16,cache={"threshold":0.25},cache=null').cache is None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("fp8", "unknown recipe 'fp8'"),
        ("chanels_last", "did you mean channels_last?"),
        ("", "unknown recipe ''"),
        ("bf16,colour=red", "unknown field 'colour': The fields are dtype"),
        ("bf16,fused_qkv", "'fused_qkv' is not FIELD=VALUE"),
        ("bf16,atention=native", "unknown field 'atention': did you mean attention?"),
        ("bf16,fused_qkv=yes", "fused_qkv is true or false"),
        ("bf16,max_autotune=true", "no effect with execution=eager"),
        ('bf16,cache={"limit":1}', "cache takes a JSON object"),
        ("bf16,cache=2", """cache takes a JSON object of its fields, as cache={"speed_factor":2}, not '2'"""),
        ("bf16,cache={speed_factor:2}", """as cache={"speed_factor":2}, not '{speed_factor:2}'"""),
        ('bf16,cache={"speedfactor":2}', "its fields (threshold; or speed_factor), not {'speedfactor': 2}"),
        ('bf16,cache={"threshold":"much"}', "threshold is a number"),
        ('bf16,cache={"speed_factor":"twice"}', "speed_factor is a number"),
        ("bf16,cache=true", "cache is null or a JSON object"),
        ("compiled,inductor_flags=null", "inductor_flags takes a JSON object"),
        ('compiled,inductor_flags={"epilogue_fusion":2}', "true, false or null, not 2"),
    ],
)
def test_parse_refuses(text: str, words: str) -> None:
    with pytest.raises(RecipeError) as raised:
        parse(text)
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)
