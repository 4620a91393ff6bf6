"""torch.compile: the same image, one compilation a shape, and nothing set in the process."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

import recipes
from recipes import InductorFlags, Recipe, compile
from recipes.compile import FEW_CANDIDATES, MAX_AUTOTUNE, inductor_options
from utils.compile_clock import CompileClock

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_options_are_inductors_own() -> None:
    known = torch._inductor.list_options()
    recipe = replace(recipes.named()["inductor_flags"], max_autotune=True)
    options = inductor_options(recipe, CPU)
    on_a_gpu = inductor_options(recipe, torch.device("cuda"))
    assert set(on_a_gpu) <= set(known)
    assert on_a_gpu == {**options, **FEW_CANDIDATES}
    assert options == {
        **MAX_AUTOTUNE,
        "conv_1x1_as_mm": True,
        "epilogue_fusion": False,
        "coordinate_descent_tuning": True,
        "coordinate_descent_check_all_directions": True,
    }
    assert inductor_options(Recipe(execution="compile"), torch.device("cuda")) == {}
    assert not [name for name in torch._inductor.list_mode_options("max-autotune-no-cudagraphs") if name not in options]


@pytest.mark.parametrize(
    ("description", "kept"),
    [
        ("", True),  # ATen's
        ("ACC_TYPE='tl.float32', BLOCK_K=64, BLOCK_M=128, BLOCK_N=256, num_stages=4, num_warps=8", True),
        ("ACC_TYPE='tl.float32', BLOCK_K=128, BLOCK_M=128, BLOCK_N=128, num_stages=4, num_warps=8", True),
        ("ACC_TYPE='tl.float32', BLOCK_K=32, BLOCK_M=128, BLOCK_N=128, num_stages=3, num_warps=4", False),
        ("ACC_TYPE='tl.float32', BLOCK_K=128, BLOCK_M=64, BLOCK_N=128, num_stages=4, num_warps=4", False),
        ("ACC_TYPE='tl.float32', BLOCK_K=128, BLOCK_M=16, BLOCK_N=128, num_stages=4, num_warps=4", False),
    ],
)
def test_few_candidates_of_the_search_are_kept(description: str, kept: bool) -> None:
    pattern = FEW_CANDIDATES["test_configs.autotune_choice_desc_regex"]
    assert bool(re.search(pattern, description)) == kept  # as Inductor applies it


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "compilations"),
    [
        # The double block, the single block and the decoder; or transformer and decoder. Of text encoders CLIP's layer,
        # T5's first and T5's others.
        (Recipe(execution="compile"), 3),
        (Recipe(execution="compile", compile_scope="whole", channels_last=True, fused_qkv=True), 2),
        (Recipe(execution="compile", inductor_flags=InductorFlags(conv_1x1_as_mm=True, epilogue_fusion=False)), 3),
        (Recipe(execution="compile", max_autotune=True), 3),
        (Recipe(execution="compile", modulation="hoisted", hoisted_embeddings=True), 3),
        (Recipe(execution="compile", compiled_text_encoders=True), 6),
        (Recipe(execution="compile", compile_scope="whole", compiled_text_encoders=True), 5),
    ],
    ids=["regional", "whole", "flags", "max-autotune", "hoisted", "text-encoders", "whole-text-encoders"],
)
def test_close_to_eager_without_recompiling(tiny: Callable, draw: Callable, recipe: Recipe, compilations: int) -> None:
    configuration = copy.deepcopy(torch._inductor.config.get_config_copy())
    pipe = tiny()
    applied = recipes.apply(pipe, recipe)
    assert applied["execution"].startswith(f"torch.compile, {recipe.compile_scope}")
    with CompileClock() as clock:
        draw(pipe, steps=2)
    assert clock.compilations == compilations
    assert clock.seconds > 1
    with CompileClock() as clock, torch._dynamo.config.patch(error_on_recompile=True):
        for seed, prompt in ((1, "two blue squares"), (2, "a green star above a white circle")):
            image = draw(pipe, prompt, seed, steps=2)
            np.testing.assert_allclose(image, draw(tiny(), prompt, seed, steps=2), atol=1e-3)
    assert clock.compilations == 0
    assert torch._inductor.config.get_config_copy() == configuration


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 2])
def test_two_compilations_for_all_blocks(tiny: Callable, draw: Callable, batch: int) -> None:
    """Every double block gets its input as every other does, and so does every single block."""
    pipe = tiny()
    recipes.apply(pipe, Recipe(execution="compile"))
    torch._dynamo.utils.counters.clear()
    draw(pipe, batch=batch, steps=2, output_type="latent")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    assert len(pipe.transformer.transformer_blocks) + len(pipe.transformer.single_transformer_blocks) == 6


@pytest.mark.parametrize("scope", ["regional", "whole"])
def test_many_shapes(tiny: Callable, predict: Callable, monkeypatch: pytest.MonkeyPatch, scope: str) -> None:
    """One more than Dynamo's own limit, each a compilation of its own; the limit is as it was afterwards."""
    limit = torch._dynamo.config.recompile_limit
    pipe, plain = tiny(), tiny()
    # Dynamo alone, whose limit it is: Inductor would take half a minute a shape.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    monkeypatch.setattr(compile, "inductor_options", lambda recipe, device: None)
    compile.apply(pipe, Recipe(execution="compile", compile_scope=scope))
    torch._dynamo.utils.counters.clear()
    for batch in range(1, limit + 2):
        torch.testing.assert_close(predict(pipe, batch), predict(plain, batch), atol=1e-4, rtol=0)
    graphs = {"regional": 2, "whole": 1}[scope]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs * (limit + 1)
    assert torch._dynamo.config.recompile_limit == limit
