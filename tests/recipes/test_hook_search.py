"""A pipeline that doesn't look for hooks: the same images, and the transformer's modules are left alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
import torch
from diffusers import FirstBlockCacheConfig, FluxImg2ImgPipeline, FluxTransformer2DModel
from diffusers.hooks import HookRegistry

import recipes
from recipes import FirstBlockCache, Recipe, RecipeError
from utils.errors import UsageError

RECIPE = Recipe(hook_search_removal=True)


@pytest.fixture
def searched(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often the transformer's modules were looked through."""
    found: Counter[str] = Counter()
    modules = FluxTransformer2DModel.modules

    def counted(self: FluxTransformer2DModel, *args: object, **kwargs: object) -> object:
        found["modules"] += 1
        return modules(self, *args, **kwargs)

    monkeypatch.setattr(FluxTransformer2DModel, "modules", counted)
    reset = HookRegistry.reset_stateful_hooks

    def resetting(self: HookRegistry, *args: object, **kwargs: object) -> None:
        found["hooks"] += 1
        reset(self, *args, **kwargs)

    monkeypatch.setattr(HookRegistry, "reset_stateful_hooks", resetting)
    return found


def test_draws_the_same_without_a_search(tiny: Callable, draw: Callable, searched: Counter[str]) -> None:
    pipe, plain = tiny(), tiny()
    expected = draw(plain)
    assert searched["modules"] >= 2
    assert searched["hooks"] >= 1
    done = recipes.apply(pipe, RECIPE)
    assert done["hook_search_removal"] == "no search for hooks at each call"
    searched.clear()
    assert np.array_equal(draw(pipe), expected)
    assert not searched


@pytest.mark.parametrize("field", ["text_encoder", "text_encoder_2"])
def test_text_encoders_are_not_searched(tiny: Callable, field: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, plain = tiny(), tiny()
    recipes.apply(pipe, RECIPE)
    encoder, inner = getattr(pipe, field), type(getattr(pipe, field).get_input_embeddings())
    given = {"prompt": ["a red circle", "a cross"], "prompt_2": ["two", "three"], "num_images_per_prompt": 2}
    with torch.no_grad():
        expected = plain.encode_prompt(**given, max_sequence_length=16)
    seen: list[object] = []
    monkeypatch.setattr(inner, "_hf_hook", property(seen.append), raising=False)
    with torch.no_grad():
        got = pipe.encode_prompt(**given, max_sequence_length=16)
        assert not [module for module in seen if module is encoder.get_input_embeddings()]
        plain.encode_prompt("a cross")
    assert seen, "what diffusers does"
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert len(list(encoder.modules())) > 10, "for whoever else asks"


def test_an_encoder_that_fails_has_its_modules_again(tiny: Callable) -> None:
    pipe = tiny()
    recipes.apply(pipe, RECIPE)
    with pytest.raises(ValueError, match="text input must be of type"):
        pipe.encode_prompt([1, 2])
    assert len(list(pipe.text_encoder.modules())) > 10


def test_the_device_is_where_the_weights_are(tiny: Callable) -> None:
    pipe = tiny()
    recipes.apply(pipe, RECIPE)
    assert pipe._execution_device == torch.device("cpu")
    pipe.transformer.to("meta")
    assert pipe._execution_device == torch.device("cpu")
    pipe.to("meta")
    assert pipe._execution_device == torch.device("meta")


def test_other_pipelines_keep_to_diffusers(tiny: Callable) -> None:
    pipe, other = tiny(), tiny()
    kind = type(pipe)
    recipes.apply(pipe, RECIPE)
    assert type(pipe).__name__ == kind.__name__
    assert isinstance(pipe, kind)
    assert type(other) is kind
    assert "_reset_stateful_cache" not in vars(other.transformer)


def test_of_another_class(tiny: Callable) -> None:
    pipe = FluxImg2ImgPipeline(**tiny().components)
    recipes.apply(pipe, RECIPE)
    pipe.set_progress_bar_config(disable=True)
    image = torch.zeros(1, 3, 64, 64)
    assert len(pipe("a red circle", image=image, height=64, width=64, num_inference_steps=2, strength=1.0).images) == 1


def test_hooks_before_and_after_it_are_refused(tiny: Callable) -> None:
    pipe = tiny()
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(RecipeError, match="needs a pipeline without hooks, transformer has some"):
        recipes.apply(pipe, RECIPE)
    pipe = tiny()
    recipes.apply(pipe, RECIPE)
    with pytest.raises(UsageError, match="enable_cache after a recipe"):
        pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(UsageError, match="enable_model_cpu_offload after a recipe: ") as refused:
        pipe.enable_model_cpu_offload()
    assert "with hook_search_removal=true nobody looks for hooks" in str(refused.value)
    with pytest.raises(RecipeError, match="cache with a threshold needs hook_search_removal=false"):
        Recipe(cache=FirstBlockCache(), hook_search_removal=True)
