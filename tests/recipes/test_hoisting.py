"""What is computed before the denoising loop: the same values as at each step, whatever the call looks like."""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import nullcontext as nothing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxImg2ImgPipeline, FluxKontextPipeline, FluxTransformer2DModel
from PIL import Image

import recipes
from export.store import PackageStore
from recipes import Recipe
from recipes.hoisting import Remembered, hoisted, modulated
from recipes.modulation import Precomputed, _at, _found, _position
from utils.compile_clock import CompileClock
from utils.errors import UserError
from utils.ranges import watch

MODULATION = Recipe(modulation="hoisted")
EMBEDDINGS = Recipe(hoisted_embeddings=True)
BOTH = Recipe(modulation="hoisted", hoisted_embeddings=True)
# Latents after some steps: float32 itself is up to 1.5e-4 from float64, another step's modulation 1.4 and more.
ROUNDING = 1e-4
ALL = pytest.mark.parametrize("recipe", [MODULATION, EMBEDDINGS, BOTH], ids=["modulation", "embeddings", "both"])


def with_guidance(pipe: Any) -> Any:
    """The pipeline with a small transformer like FLUX.1-dev's, which takes guidance; random weights."""
    torch.manual_seed(0)
    config = {**pipe.transformer.config, "guidance_embeds": True}
    pipe.register_modules(transformer=FluxTransformer2DModel.from_config(config))
    return pipe


def own_embeddings(pipe: Any) -> dict[str, Any]:
    """A prompt as a user hands it in encoded."""
    with torch.no_grad():
        prompt, pooled, _ = pipe.encode_prompt("a red circle", None, max_sequence_length=64)
    return {"prompt": None, "prompt_embeds": prompt, "pooled_prompt_embeds": pooled}


def change_prompt_at_step_one(pipe: Any, index: int, timestep: torch.Tensor, tensors: dict) -> dict:
    if index == 1:
        tensors["prompt_embeds"] = tensors["prompt_embeds"] * 0.5
    return tensors


def change_prompt_in_place(pipe: Any, index: int, timestep: torch.Tensor, tensors: dict) -> dict:
    if index == 1:
        tensors["prompt_embeds"].mul_(0.5)
    return {}


CALLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "batch": {"batch": 3},
    "two-prompts": {"prompt": ["a red circle", "a blue star"]},
    "classifier-free-guidance": {"negative_prompt": "a green square", "true_cfg_scale": 2.0},
    "own-sigmas": {"sigmas": [1.0, 0.7, 0.65, 0.1]},
    "new-embeddings-from-a-callback": {
        "callback_on_step_end": change_prompt_at_step_one,
        "callback_on_step_end_tensor_inputs": ["prompt_embeds"],
    },
    "embeddings-written-by-a-callback": {
        "callback_on_step_end": change_prompt_in_place,
        "callback_on_step_end_tensor_inputs": ["prompt_embeds"],
    },
}


@ALL
def test_keeps_every_image(tiny: Callable, draw: Callable, recipe: Recipe) -> None:
    plain, hoisted = tiny(), tiny()
    recipes.apply(hoisted, recipe)
    for name, options in CALLS.items():
        for steps in (3, 1):  # of one pipeline, one call after another
            if "prompt" in options:
                options = {"generator": torch.Generator().manual_seed(0), **options}
            arguments = {"steps": steps, "output_type": "latent", **options}
            if "generator" in arguments:
                arguments["generator"] = torch.Generator().manual_seed(0)
            expected = draw(plain, **arguments)
            if "generator" in arguments:
                arguments["generator"] = torch.Generator().manual_seed(0)
            torch.testing.assert_close(draw(hoisted, **arguments), expected, atol=ROUNDING, rtol=0, msg=name)


@ALL
def test_keeps_rounding_in_bfloat16(tiny: Callable, draw: Callable, error_of: Callable, recipe: Recipe) -> None:
    plain, hoisted, exact = tiny(torch.bfloat16), tiny(torch.bfloat16), tiny()
    recipes.apply(hoisted, Recipe(**{**recipe.to_dict(), "dtype": "bfloat16", "inductor_flags": recipe.inductor_flags}))
    expected, got, reference = (draw(p, steps=4, output_type="latent").float() for p in (plain, hoisted, exact))
    assert error_of(got, reference) <= 1.1 * error_of(expected, reference)
    assert error_of(got, expected) < 0.01


def test_guidance(tiny: Callable, draw: Callable) -> None:
    plain, hoisted = with_guidance(tiny()), with_guidance(tiny())
    recipes.apply(hoisted, BOTH)
    images = []
    for scale in (3.5, 1.0):
        options = {"guidance_scale": scale, "steps": 2, "batch": 2, "output_type": "latent"}
        images.append(draw(hoisted, **options))
        torch.testing.assert_close(images[-1], draw(plain, **options), atol=ROUNDING, rtol=0)
    assert (images[0] - images[1]).abs().max() > 1e-3, "guidance matters here"


def test_kontext(tiny: Callable, draw: Callable) -> None:
    plain, hoisted = (FluxKontextPipeline(**tiny().components) for _ in range(2))
    for pipe in (plain, hoisted):
        pipe.set_progress_bar_config(disable=True)
    recipes.apply(hoisted, BOTH)
    image = Image.radial_gradient("L").resize((48, 80)).convert("RGB")
    options = {"image": image, "max_area": 64 * 64, "_auto_resize": False, "steps": 2}
    # Of pixels in 0..1: rounding, a hundredth of a byte's step at most.
    np.testing.assert_allclose(draw(hoisted, **options), draw(plain, **options), atol=ROUNDING, rtol=0)


@ALL
def test_own_embeddings_of_one_prompt_for_several_images(tiny: Callable, draw: Callable, recipe: Recipe) -> None:
    """diffusers repeats what it encodes itself, and leaves what it is given to broadcasting."""
    plain, hoisted = with_guidance(tiny()), with_guidance(tiny())
    recipes.apply(hoisted, recipe)
    options = {**own_embeddings(plain), "batch": 3, "steps": 2, "output_type": "latent"}
    torch.testing.assert_close(draw(hoisted, **options), draw(plain, **options), atol=ROUNDING, rtol=0)


@pytest.mark.parametrize("by_hand", [False, True])
@pytest.mark.parametrize("change", ["written", "replaced"])
@ALL
def test_same_embeddings_again_after_the_weights_changed(
    tiny: Callable, draw: Callable, predict: Callable, recipe: Recipe, change: str, by_hand: bool
) -> None:
    plain, hoisted = tiny(), tiny()
    recipes.apply(hoisted, recipe)
    embeddings, seen = own_embeddings(plain), []
    tensors: dict[str, Any] = {}

    def results(pipe: Any) -> torch.Tensor:
        if not by_hand:
            return draw(pipe, **embeddings, output_type="latent")
        with torch.no_grad():
            return pipe.transformer(**tensors, return_dict=False)[0]

    hook = plain.transformer.register_forward_pre_hook(lambda *call: tensors.update(call[2]), with_kwargs=True)
    predict(plain)
    hook.remove()
    tensors.pop("return_dict")
    for _ in range(2):
        seen.append(results(plain))
        torch.testing.assert_close(results(hoisted), seen[-1], atol=ROUNDING, rtol=0)
        for pipe in (plain, hoisted):
            for weight in pipe.transformer.parameters():
                if change == "written":
                    with torch.no_grad():
                        weight.mul_(1.05)
                else:
                    weight.data = weight.data * 1.05
    assert (seen[0] - seen[1]).abs().max() > 1e-2


@ALL
def test_gradients_of_the_transformer_called_by_hand(tiny: Callable, predict: Callable, recipe: Recipe) -> None:
    """Also of what was computed without them before."""
    plain, hoisted = tiny(), tiny()
    recipes.apply(hoisted, recipe)
    tensors: dict[str, Any] = {}
    hook = plain.transformer.register_forward_pre_hook(lambda *call: tensors.update(call[2]), with_kwargs=True)
    predict(plain)
    hook.remove()
    of = [tensors[name].requires_grad_() for name in ("encoder_hidden_states", "pooled_projections")]
    with torch.no_grad():
        hoisted.transformer(**tensors)
    for _ in range(2):
        expected, got = (
            torch.autograd.grad(pipe.transformer(**tensors)[0].square().mean(), of) for pipe in (plain, hoisted)
        )
        torch.testing.assert_close(got, expected)
        assert all(gradient.abs().max() > 1e-6 for gradient in expected)


def test_linears_run_once_a_call(tiny: Callable, draw: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tiny()
    assert recipes.apply(pipe, BOTH)["modulation"] == "9 Linears once a call for all its steps"
    rows: list[int] = []
    compute = Precomputed.compute
    monkeypatch.setattr(Precomputed, "compute", lambda self, x: rows.append(len(x)) or compute(self, x))
    contexts: list[int] = []
    pipe.transformer.context_embedder.register_forward_hook(lambda *_: contexts.append(1))
    draw(pipe, steps=5, batch=2)
    assert rows == [10] * 9, "5 steps x 2 images, in one GEMM for each of the 9 Linears"
    assert len(contexts) == 1
    draw(pipe, steps=5)
    assert rows[9:] == [5] * 9, "another call's prompt is another prompt"
    assert len(contexts) == 2


def test_pipeline_that_does_not_say_which_step_it_is_at(tiny: Callable, draw: Callable) -> None:
    plain, hoisted = (FluxImg2ImgPipeline(**tiny().components) for _ in range(2))
    for pipe in (plain, hoisted):
        pipe.set_progress_bar_config(disable=True)
    assert recipes.apply(hoisted, BOTH)["modulation"] == "9 Linears at each step"
    image = Image.radial_gradient("L").resize((64, 64)).convert("RGB")
    for strength in (0.5, 1.0):
        options = {"image": image, "strength": strength, "steps": 4, "output_type": "latent"}
        torch.testing.assert_close(draw(hoisted, **options), draw(plain, **options), atol=ROUNDING, rtol=0)


def test_weights_keep_their_names(tiny: Callable) -> None:
    plain, hoisted = tiny(), tiny()
    recipes.apply(hoisted, BOTH)
    before, after = plain.transformer.state_dict(), hoisted.transformer.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(isinstance(linear, Precomputed) for group in modulated(hoisted.transformer) for linear in group)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "compilations"),
    [
        ({"execution": "aoti"}, 4),  # double block, single block, what lies before and what lies after them
        ({"execution": "compile", "compile_scope": "whole"}, 1),
    ],
)
def test_step_is_what_is_compiled_and_packaged(
    tiny: Callable, draw: Callable, tmp_path: Path, options: dict[str, Any], compilations: int
) -> None:
    plain, hoisted = tiny(), tiny()
    recipes.apply(hoisted, replace(BOTH, **options), PackageStore(tmp_path))
    with CompileClock() as clock:
        draw(hoisted, output_type="latent")
    assert clock.compilations == compilations
    with CompileClock() as clock:
        for steps, prompt in ((3, "a blue star"), (2, "two green squares")):
            got, expected = (draw(pipe, prompt, steps=steps, output_type="latent") for pipe in (hoisted, plain))
            torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)
    assert clock.compilations == 0, "neither the prompt nor the number of steps is part of a step"


@ALL
def test_transformer_called_by_hand(tiny: Callable, draw: Callable, predict: Callable, recipe: Recipe) -> None:
    plain, hoisted = tiny(), tiny()
    recipes.apply(hoisted, recipe)
    torch.testing.assert_close(predict(hoisted), predict(plain), atol=1e-5, rtol=0)  # no loop has been yet
    draw(hoisted)  # a loop's table is there, and has nothing to do with what comes now
    torch.testing.assert_close(predict(hoisted, 2), predict(plain, 2), atol=1e-5, rtol=0)


@ALL
@pytest.mark.parametrize("interruption", [KeyboardInterrupt, RuntimeError])
def test_transformer_called_by_hand_after_an_interrupted_call(
    tiny: Callable, draw: Callable, predict: Callable, recipe: Recipe, interruption: type[BaseException]
) -> None:
    plain, hoisted = tiny(), tiny()
    kind = type(hoisted)
    recipes.apply(hoisted, recipe)

    def interrupt(*_: Any) -> dict:
        raise interruption

    with pytest.raises(interruption):
        draw(hoisted, steps=3, callback_on_step_end=interrupt)
    torch.testing.assert_close(predict(hoisted), predict(plain), atol=1e-5, rtol=0)
    expected = draw(plain, steps=2, output_type="latent")
    torch.testing.assert_close(draw(hoisted, steps=2, output_type="latent"), expected, atol=ROUNDING, rtol=0)
    assert isinstance(hoisted, kind)
    assert type(hoisted).__name__ == kind.__name__


@pytest.mark.parametrize(
    ("tell", "words"),
    [
        (lambda timestep: timestep, "another timestep than the one that the pipeline is at"),
        (torch.clone, "a timestep that isn't the scheduler's"),
    ],
    ids=["one-of-the-schedulers", "a-tensor-of-its-own"],
)
def test_timestep_that_is_not_the_pipelines_is_an_error(
    tiny: Callable, draw: Callable, predict: Callable, tell: Callable, words: str
) -> None:
    pipe = tiny()
    recipes.apply(pipe, MODULATION)

    def callback(pipe: Any, index: int, timestep: torch.Tensor, tensors: dict) -> dict:
        pipe._current_timestep = tell(timestep)
        predict(pipe)
        return {}

    with pytest.raises(RuntimeError, match=words):
        draw(pipe, steps=3, callback_on_step_end=callback)


def test_timesteps_are_found_by_their_place_or_by_their_value() -> None:
    steps = torch.tensor([9.0, 6.0, 4.0])
    views = list(steps)
    assert [_position(view, steps) for view in views] == [0, 1, 2]
    assert [_position(view, steps[1:]) for view in views] == [None, 0, 1]
    assert [_position(other, steps) for other in (torch.tensor(6.0), 6.0, steps[:2], views[0].int())] == [None] * 4
    table = torch.arange(12.0).view(3, 1, 4)
    for position in range(3):
        torch.testing.assert_close(_at(position, steps, table, steps[position, None]), table[position])
        torch.testing.assert_close(_found(steps, table, steps[position, None]), table[position])


@ALL
def test_what_a_hoisted_step_cannot_take_is_refused(tiny: Callable, draw: Callable, recipe: Recipe) -> None:
    pipe = tiny()
    recipes.apply(pipe, recipe)
    with pytest.raises(UserError, match="takes no scale: use a recipe with modulation=per_step") as raised:
        draw(pipe, joint_attention_kwargs={"scale": 0.5})
    assert "\n" not in str(raised.value)
    with pytest.raises(UserError, match="takes no controlnet_block_samples"):
        pipe.transformer(
            torch.zeros(1, 16, 64),
            encoder_hidden_states=torch.zeros(1, 8, 256),
            pooled_projections=torch.zeros(1, 256),
            timestep=torch.ones(1),
            img_ids=torch.zeros(16, 3),
            txt_ids=torch.zeros(8, 3),
            controlnet_block_samples=[torch.zeros(1, 16, 256)],
        )


def test_remembered_by_the_objects_themselves() -> None:
    calls: list[float] = []

    def function(x: torch.Tensor, factor: float | None) -> torch.Tensor:
        calls.append(float(x[0]))
        return x * (factor or 1)

    remembered = Remembered(function)
    a, b, c = (torch.full((1,), float(i)) for i in range(3))
    assert remembered(a, None) is remembered(a, None)
    assert remembered(b, None) is not remembered(a, None)
    assert calls == [0, 1]
    remembered(a.clone(), None)  # equal, but another one: a makes way
    assert calls == [0, 1, 0]
    a.add_(5)
    assert remembered(a, None).item() == 5
    remembered(b, None)
    remembered(c, None)
    assert calls == [0, 1, 0, 5, 1, 2]
    with torch.inference_mode():
        x = torch.zeros(1)
        remembered(x, None)
        x.add_(1)
        assert remembered(x, None).item() == 1


@ALL
@pytest.mark.parametrize("own", [False, True], ids=["prompt", "own-embeddings"])
def test_in_inference_mode_once_a_call_too(
    tiny: Callable, draw: Callable, recipe: Recipe, own: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, pipe = tiny(), tiny()
    recipes.apply(pipe, recipe)
    calls: list[str] = []
    for one in hoisted(pipe.transformer):
        monkeypatch.setattr(
            one, "function", partial(lambda name, f, *a: calls.append(name) or f(*a), one.name, one.function)
        )
    with torch.inference_mode():
        given = own_embeddings(plain) if own else {}
        expected = draw(plain, steps=4, **given)
        got = draw(pipe, steps=4, **given)
    np.testing.assert_allclose(got, expected, atol=1e-3)
    assert sorted(calls) == sorted(one.name for one in hoisted(pipe.transformer))


def test_offloading_needs_a_gpu(tiny: Callable) -> None:
    with pytest.raises(recipes.RecipeError, match="modulation=offloaded needs a cuda device"):
        recipes.apply(tiny(), Recipe(modulation="offloaded"))


@pytest.mark.gpu
@pytest.mark.parametrize("modulation", ["hoisted", "offloaded"])
def test_on_a_gpu(tiny: Callable, draw: Callable, waiting_is_an_error: Callable, modulation: str) -> None:
    cuda = torch.device("cuda")
    plain, hoisted = tiny(device=cuda), tiny(device=cuda)
    gc.collect()  # pipelines of other tests
    before = torch.cuda.memory_allocated()
    applied = recipes.apply(
        hoisted, Recipe(modulation=modulation, hoisted_embeddings=True, scheduler_sync_removal=True)
    )
    freed = before - torch.cuda.memory_allocated()
    weights = sum(p.nbytes for group in modulated(hoisted.transformer) for m in group for p in m.parameters())
    if modulation == "offloaded":
        assert f"their {weights} bytes in host memory" in applied["modulation"]
        assert 0 <= freed - weights < 2**20, "a large block keeps what would be less than 1 MiB apart"
        assert all(p.is_pinned() for group in modulated(hoisted.transformer) for m in group for p in m.parameters())
    options = {"steps": 3, "batch": 2, "output_type": "latent"}
    torch.testing.assert_close(draw(hoisted, **options), draw(plain, **options), atol=1e-3, rtol=0)
    with watch(hoisted, lambda stage: waiting_is_an_error() if stage == "denoising_step" else nothing()):
        draw(hoisted, **options)
