"""torch.compile: the same image, one compilation a shape, and nothing set in the process."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

import recipes
from recipes import InductorFlags, Recipe
from recipes.compile import MAX_AUTOTUNE, inductor_options
from utils.compile_clock import CompileClock


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_options_are_inductors_own() -> None:
    known = torch._inductor.list_options()
    recipe = recipes.named()["inductor_flags"]
    options = inductor_options(recipe)
    assert set(options) <= set(known)
    assert options == {
        **MAX_AUTOTUNE,
        "conv_1x1_as_mm": True,
        "epilogue_fusion": False,
        "coordinate_descent_tuning": True,
        "coordinate_descent_check_all_directions": True,
    }
    assert inductor_options(Recipe(execution="compile")) == {}
    assert not [name for name in torch._inductor.list_mode_options("max-autotune-no-cudagraphs") if name not in options]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "compilations"),
    [
        # The double block, the single block and the decoder; or transformer and decoder; and both text encoders.
        (Recipe(execution="compile"), 3),
        (Recipe(execution="compile", compile_scope="whole", channels_last=True, fused_qkv=True), 2),
        (Recipe(execution="compile", inductor_flags=InductorFlags(conv_1x1_as_mm=True, epilogue_fusion=False)), 3),
        (Recipe(execution="compile", max_autotune=True), 3),
        (Recipe(execution="compile", modulation="hoisted", hoisted_embeddings=True), 3),
        (Recipe(execution="compile", compiled_text_encoders=True), 5),
    ],
    ids=["regional", "whole", "flags", "max-autotune", "hoisted", "text-encoders"],
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
