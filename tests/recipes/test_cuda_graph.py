"""A denoising step and the decoder as CUDA graphs: refused without a GPU; on one, the same images without waiting."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import recipes
from export.store import PackageStore
from recipes import FirstBlockCache, Recipe, RecipeError
from recipes.hoisting import hoisted
from utils.cuda_graph import Graphed
from utils.ranges import watch

EAGER = Recipe(scheduler_sync_removal=True, cuda_graph=True)
COMPILED = Recipe(scheduler_sync_removal=True, cuda_graph=True, execution="compile")
WHOLE = Recipe(scheduler_sync_removal=True, cuda_graph=True, execution="compile", compile_scope="whole")
HOISTED = Recipe(scheduler_sync_removal=True, cuda_graph=True, modulation="hoisted", hoisted_embeddings=True)
PACKAGED = Recipe(scheduler_sync_removal=True, cuda_graph=True, execution="aoti")


def graphs(pipe: Any) -> int:
    assert isinstance(pipe.transformer.forward, Graphed)
    assert isinstance(pipe.vae.decoder.forward, Graphed)
    assert pipe.transformer.forward.graphs is pipe.vae.decoder.forward.graphs
    return len(pipe.transformer.forward.graphs.values)


def before_loop(pipe: Any) -> list[Any]:
    """The keys of the graphs of what is hoisted."""
    return list({key for one in hoisted(pipe.transformer) for key in one.function.graphs.values})


def test_raises_on_cpu(tiny: Callable) -> None:
    pipe = tiny()
    with pytest.raises(RecipeError, match=r"cuda_graph=True needs a cuda device, this is cpu; .* --recipe bf16$"):
        recipes.apply(pipe, recipes.parse("bf16,cuda_graph=true"))
    assert "forward" not in vars(pipe.transformer)


def test_refuses_a_step_cache() -> None:
    with pytest.raises(RecipeError, match="cache with a threshold needs cuda_graph=false"):
        Recipe(cache=FirstBlockCache(), cuda_graph=True)


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", [EAGER, HOISTED], ids=["plain", "hoisted"])
def test_weights_that_were_moved_are_read_where_they_are(tiny: Callable, draw: Callable, recipe: Recipe) -> None:
    pipe = tiny(device=torch.device("cuda"))
    recipes.apply(pipe, recipe)
    before = torch.from_numpy(draw(pipe))
    assert graphs(pipe) == 2
    pipe.to("cuda")
    assert graphs(pipe) == 2, "they stayed where they were"
    pipe.to("cpu")
    assert graphs(pipe) == 0
    assert not before_loop(pipe)
    others = [torch.full((n,), 1e3, device="cuda") for n in (2**20, 2**16, 2**12) for _ in range(20)]
    pipe.to("cuda")
    torch.testing.assert_close(torch.from_numpy(draw(pipe)), before, atol=1e-2, rtol=0)
    assert graphs(pipe) == 2
    assert len(others) == 60, "in the memory that was theirs"


@pytest.mark.gpu
@pytest.mark.parametrize(
    "recipe", [EAGER, COMPILED, WHOLE, HOISTED, PACKAGED], ids=["eager", "compiled", "whole", "hoisted", "packages"]
)
def test_keeps_images_without_waiting(
    tiny: Callable, draw: Callable, waiting_is_an_error: Callable, recipe: Recipe, tmp_path: Any
) -> None:
    from export.store import PackageStore

    cuda = torch.device("cuda")
    plain, graphed = tiny(device=cuda), tiny(device=cuda)
    recipes.apply(graphed, recipe, PackageStore(tmp_path))
    first = draw(graphed, steps=2)
    kept = torch.from_numpy(first).clone()
    assert graphs(graphed) == 2

    def close(**options: Any) -> None:
        got, expected = (torch.from_numpy(draw(pipe, steps=3, **options)) for pipe in (graphed, plain))
        # Far above TF32 convolutions chosen otherwise, far below what another prompt or seed changes.
        torch.testing.assert_close(got, expected, atol=1e-2, rtol=0)

    close(prompt="two blue squares", seed=1)
    close(prompt="a green star above a white circle", seed=2)
    assert graphs(graphed) == 2, "another prompt, seed and number of steps are the same kind of call"
    assert len(before_loop(graphed)) == (3 if recipe is HOISTED else 0), (
        "embeddings, and modulation of 2 and of 3 steps"
    )
    if recipe.execution != "aoti":  # a package for each would take a minute
        close(batch=2)
        assert graphs(graphed) == 4
        close(height=96, width=64)
        assert graphs(graphed) == 6
    assert torch.equal(torch.from_numpy(draw(graphed, steps=2)), kept), "what came between changed nothing"
    assert torch.equal(torch.from_numpy(first), kept)

    def enter(stage: str) -> Any:
        return waiting_is_an_error() if stage in ("denoising_step", "decoding") else nullcontext()

    with watch(graphed, enter):
        draw(graphed, "a white cross", steps=3)


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", [COMPILED, WHOLE, PACKAGED], ids=["compiled", "whole", "packaged"])
def test_text_encoders_are_graphs_too(
    tiny: Callable, draw: Callable, waiting_is_an_error: Callable, recipe: Recipe, tmp_path: Path
) -> None:
    plain, graphed = (tiny(device=torch.device("cuda")) for _ in range(2))
    recipes.apply(graphed, replace(recipe, compiled_text_encoders=True), PackageStore(tmp_path))
    for prompt in ("a red circle", "two blue squares", "a red circle"):
        own, pooled, _ = graphed.encode_prompt(prompt, prompt_2=None, max_sequence_length=64)
        other, other_pooled, _ = plain.encode_prompt(prompt, prompt_2=None, max_sequence_length=64)
        torch.testing.assert_close(own, other, atol=1e-3, rtol=0)
        torch.testing.assert_close(pooled, other_pooled, atol=1e-3, rtol=0)
    assert len(graphed.transformer.forward.graphs.values) == 2
    got, expected = (torch.from_numpy(draw(pipe, steps=2)) for pipe in (graphed, plain))
    torch.testing.assert_close(got, expected, atol=1e-2, rtol=0)
    assert graphs(graphed) == 4
    tokens = torch.ones(1, 64, dtype=torch.int64, device="cuda")
    with waiting_is_an_error():
        graphed.text_encoder_2(tokens, output_hidden_states=False)
    assert graphs(graphed) == 4


@pytest.mark.gpu
def test_latents_of_a_step_outlive_the_next(tiny: Callable, draw: Callable) -> None:
    pipe, plain = (tiny(device=torch.device("cuda")) for _ in range(2))
    recipes.apply(pipe, EAGER)
    seen: dict[int, list[torch.Tensor]] = {0: [], 1: []}
    for which, one in enumerate((pipe, plain)):
        predict = one.transformer.forward

        def remember(*args: Any, predict: Any = predict, which: int = which, **kwargs: Any) -> Any:
            out = predict(*args, **kwargs)
            seen[which].append(out[0])
            return out

        one.transformer.forward = remember
        draw(one, steps=4)
    for got, expected in zip(seen[0], seen[1], strict=True):
        torch.testing.assert_close(got, expected, atol=1e-3, rtol=0)


@pytest.mark.gpu
def test_fewer_graphs_than_sizes_make_way(tiny: Callable, draw: Callable) -> None:
    pipe, plain = (tiny(device=torch.device("cuda")) for _ in range(2))
    recipes.apply(pipe, EAGER)
    pipe.transformer.forward.graphs.limit = 3
    for side in (64, 96, 128, 64, 128):
        got, expected = (torch.from_numpy(draw(p, height=side, width=64)) for p in (pipe, plain))
        torch.testing.assert_close(got, expected, atol=1e-2, rtol=0)
    assert graphs(pipe) == 3
