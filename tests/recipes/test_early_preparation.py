"""Copies before the loop that are queued: the same values in the same order, and on a GPU the host runs ahead of it."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxImg2ImgPipeline
from torch.overrides import TorchFunctionMode

import recipes
from recipes import Recipe, early_preparation, hook_search, loop_graph, scheduler_sync
from recipes.early_preparation import EarlyPipeline, Queued
from tests.recipes.kontext import as_kontext, edit

ALONE = Recipe(early_preparation=True)
SEARCHLESS = Recipe(early_preparation=True, hook_search_removal=True, scheduler_sync_removal=True)
LOOP = replace(SEARCHLESS, modulation="hoisted", hoisted_embeddings=True, cuda_graph=True, loop_graph=True)
EITHER = pytest.mark.parametrize("recipe", [ALONE, SEARCHLESS], ids=["alone", "hook-search-removed"])


def own_embeddings(pipe: Any) -> dict[str, Any]:
    """A prompt as a user hands it in encoded."""
    with torch.no_grad():
        prompt, pooled, _ = pipe.encode_prompt("a red circle", max_sequence_length=64)
    return {"prompt": None, "prompt_embeds": prompt, "pooled_prompt_embeds": pooled}


def noise(pipe: Any) -> torch.Tensor:
    """A user's own latents of 64x64 pixels."""
    channels = pipe.transformer.config.in_channels
    return torch.randn(1, 16, channels, generator=torch.Generator().manual_seed(1), dtype=pipe.dtype).to(pipe.device)


CALLS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "plain": lambda pipe: {"steps": 3},
    "two-images": lambda pipe: {"batch": 2},
    "list": lambda pipe: {"prompt": ["a red circle"]},
    "two-prompts": lambda pipe: {"prompt": ["a red circle", "two blue stars"], "generator": torch.manual_seed(0)},
    "prompt-2": lambda pipe: {"prompt_2": "a green cross"},
    "own-embeddings": own_embeddings,
    "own-latents": lambda pipe: {"latents": noise(pipe)},
    "own-sigmas": lambda pipe: {"sigmas": [1.0, 0.7, 0.1], "steps": 3},
    "classifier-free-guidance": lambda pipe: {"negative_prompt": "a green square", "true_cfg_scale": 2.0},
}


def modes() -> int:
    return torch._C._len_torch_function_stack()


@EITHER
def test_draws_the_same(tiny: Callable, draw: Callable, recipe: Recipe) -> None:
    plain, early = tiny(), tiny()
    assert recipes.apply(early, recipe)["early_preparation"] == "copies before the loop are queued"
    for name, options in CALLS.items():
        expected, got = (draw(pipe, **options(pipe)) for pipe in (plain, early))
        assert np.array_equal(got, expected), name
    assert modes() == 0


def test_other_pipelines_draw_the_same(tiny: Callable, draw: Callable) -> None:
    plain, early = as_kontext(tiny()), as_kontext(tiny())
    recipes.apply(early, SEARCHLESS)
    assert np.array_equal(*(draw(pipe, **edit(), steps=2) for pipe in (plain, early)))
    plain, early = (FluxImg2ImgPipeline(**tiny().components) for _ in range(2))
    recipes.apply(early, SEARCHLESS)
    start = {"image": torch.zeros(1, 3, 64, 64), "steps": 2, "strength": 1.0}
    assert np.array_equal(*(draw(pipe, **start) for pipe in (plain, early)))


def ids_read(pipe: Any, call: Callable[[], object]) -> dict[str, list[torch.Tensor]]:
    """What each text encoder is given while `call` runs."""
    read: dict[str, list[torch.Tensor]] = {"text_encoder": [], "text_encoder_2": []}
    hooks = [
        getattr(pipe, name).register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[0]))
        for name, seen in read.items()
    ]
    call()
    for hook in hooks:
        hook.remove()
    return read


def test_each_encoder_is_called_once_with_the_same_ids(tiny: Callable, draw: Callable) -> None:
    plain, early = tiny(), tiny()
    recipes.apply(early, SEARCHLESS)
    given = {"prompt": ["a red circle", "two"], "prompt_2": ["a cross", "three"], "generator": torch.manual_seed(0)}
    expected, got = (ids_read(pipe, lambda pipe=pipe: draw(pipe, batch=2, **given)) for pipe in (plain, early))
    for name, read in got.items():
        assert len(read) == 1
        assert torch.equal(read[0], expected[name][0])


def test_what_is_copied_between_the_encoders_and_the_loop(
    tiny: Callable, draw: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, but that nothing has to be copied here."""
    copied: list[tuple[int, ...]] = []

    def note(tensor: torch.Tensor, device: Any = None, *others: Any, **more: Any) -> bool:
        if device is not None:
            copied.append(tuple(tensor.shape))
        return False

    pipe = tiny()
    recipes.apply(pipe, SEARCHLESS)
    monkeypatch.setattr(early_preparation, "_would_wait", note)
    seen = []
    for part in (pipe.text_encoder, pipe.text_encoder_2, pipe.transformer, pipe.vae.decoder):
        part.register_forward_pre_hook(lambda *_: seen.append(modes()))
    draw(pipe, steps=2)
    assert seen == [0] * 5, "the models run as ever"
    assert copied == [(64, 3), (1, 16, 8, 8), (16, 3), (2,)], "text's ids, noise, image's ids, timesteps"
    copied.clear()
    draw(pipe, steps=2, **CALLS["own-embeddings"](pipe), latents=noise(pipe))
    assert copied[-4:] == [(64, 3), (16, 3), (1, 16, 64), (2,)]


def test_nothing_stays_on_after_an_error_or_a_call_by_hand(tiny: Callable) -> None:
    pipe = tiny()
    recipes.apply(pipe, ALONE)
    with torch.no_grad():
        assert pipe._get_t5_prompt_embeds("a cross", max_sequence_length=8).shape[1] == 8
    assert modes() == 0
    with pytest.raises(ValueError, match="text input must be of type"):
        pipe.encode_prompt("a cross", prompt_2=[1, 2])
    with pytest.raises(ValueError, match="list of generators of length 1"):
        pipe("a cross", num_images_per_prompt=2, generator=[torch.Generator()], max_sequence_length=8)
    with pytest.raises(ValueError, match="should have the same length"):
        pipe.scheduler.set_timesteps(3, sigmas=[1.0], mu=0.5)
    assert modes() == 0


def test_without_the_field_a_pipeline_is_left_alone(tiny: Callable) -> None:
    early, other = tiny(), tiny()
    recipes.apply(early, ALONE)
    recipes.apply(other, Recipe(scheduler_sync_removal=True))
    kinds = type(tiny()), type(tiny().scheduler)
    assert (type(other), type(other.scheduler)) == kinds
    assert isinstance(early, EarlyPipeline)
    assert (type(early).__name__, type(early.scheduler).__name__) == tuple(kind.__name__ for kind in kinds)


@pytest.mark.parametrize("last", [False, True])
def test_beside_other_mixins_of_the_pipeline(tiny: Callable, draw: Callable, last: bool) -> None:
    pipe = tiny()
    expected = draw(pipe, steps=2)
    others = (hook_search, loop_graph)
    for module in (*others, early_preparation) if last else (early_preparation, *others):
        module.OPTIMIZATION.apply(pipe, ALONE)
    assert np.array_equal(draw(pipe, steps=2), expected)


@pytest.mark.parametrize("synchronisation", ["before", "after", "before-and-removed", "after-and-removed", "none"])
def test_a_scheduler_that_others_change_or_share(tiny: Callable, draw: Callable, synchronisation: str) -> None:
    pipe = tiny()
    other = type(pipe)(**pipe.components)
    expected, signature = draw(pipe, steps=2), inspect.signature(pipe.scheduler.set_timesteps)
    when, *removed = synchronisation.split("-and-")
    if when == "before":
        scheduler_sync.OPTIMIZATION.apply(other, Recipe())
    early_preparation.OPTIMIZATION.apply(pipe, ALONE)
    if when == "after":
        scheduler_sync.OPTIMIZATION.apply(other, Recipe())
    if removed:
        scheduler_sync.OPTIMIZATION.apply(other, Recipe(scheduler_sync_removal=True))
    early_preparation.OPTIMIZATION.apply(other, ALONE)
    assert inspect.signature(pipe.scheduler.set_timesteps) == signature
    assert np.array_equal(draw(pipe, steps=2), expected)


class Copies(TorchFunctionMode):
    """Notes which tensors are pinned and how they are copied to a GPU, and does neither."""

    def __init__(self) -> None:
        super().__init__()
        self.noted: Counter[str] = Counter()

    def __torch_function__(self, function: Callable, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is torch.Tensor.pin_memory:
            self.noted["pinned"] += 1
            self.noted["pinned as bfloat16"] += args[0].dtype == torch.bfloat16
            return args[0]
        if function is torch.Tensor.to and "cuda" in str((args[1:], kwargs)):
            self.noted["queued" if kwargs.get("non_blocking") else "as it was"] += 1
            return args[0]
        return function(*args, **kwargs)


def test_only_copies_to_a_gpu_go_another_way() -> None:
    tensor, gpu = torch.zeros(3), torch.device("cuda", 1)
    with Copies() as copies, Queued():
        for args, named in (
            (("cuda",), {}),
            ((gpu,), {}),
            ((gpu, torch.bfloat16), {}),
            ((), {"device": gpu, "dtype": torch.bfloat16}),
        ):
            tensor.to(*args, **named)
        noted = {"pinned": 4, "pinned as bfloat16": 2, "queued": 4}
        assert copies.noted == noted
        tensor.to(gpu, None, False)  # as nn.Module.to
        tensor.to(gpu, non_blocking=False)
        tensor.to(gpu, copy=True)
        assert copies.noted == noted | {"as it was": 3}
        assert tensor.to("cpu") is tensor
        assert tensor.to(torch.float64).dtype == torch.float64
        assert tensor.to(torch.zeros(1, dtype=torch.int32)).dtype == torch.int32
        assert tensor.to(device=torch.device("cpu"), dtype=torch.bfloat16).dtype == torch.bfloat16
        assert torch.zeros(3, device="meta").to(device="meta").device.type == "meta"
    assert copies.noted == noted | {"as it was": 3}


ON_GPU = {
    "alone": ALONE,
    "bfloat16": replace(ALONE, dtype="bfloat16"),
    "hook-search-removed": SEARCHLESS,
    "graphs": replace(LOOP, loop_graph=False),
    "loop": LOOP,
}


def on_gpu(tiny: Callable, recipe: Recipe, change: Callable = lambda pipe: pipe) -> tuple[Any, Any]:
    """Two pipelines of a recipe, the first without early preparation."""
    pipes = []
    for one in (replace(recipe, early_preparation=False), recipe):
        dtype = torch.bfloat16 if recipe.dtype == "bfloat16" else torch.float32
        pipes.append(change(tiny(dtype, torch.device("cuda"))))
        recipes.apply(pipes[-1], one)
    return pipes[0], pipes[1]


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", ON_GPU.values(), ids=ON_GPU)
def test_latents_on_a_gpu_are_the_same_bit_for_bit(tiny: Callable, draw: Callable, recipe: Recipe) -> None:
    plain, early = on_gpu(tiny, recipe)
    for name, options in CALLS.items():
        if name != "classifier-free-guidance" or not recipe.loop_graph:
            expected, got = (draw(pipe, output_type="latent", **options(pipe)) for pipe in (plain, early))
            assert torch.equal(got, expected), name
    generated = []
    for pipe in (plain, early):  # noise that is drawn on the GPU
        generator = torch.Generator("cuda").manual_seed(0)
        generated.append(draw(pipe, steps=2, generator=generator, output_type="latent"))
    assert torch.equal(*generated)


def done_at_first_step(pipe: Any, call: Callable[[], object]) -> bool:
    """Whether the GPU has done what was queued behind T5, half a second of nothing, when the transformer is called."""
    asleep, done = torch.cuda.Event(), []

    def sleep(*_: Any) -> None:
        torch.cuda._sleep(10**9)
        asleep.record()

    hooks = [
        pipe.text_encoder_2.register_forward_hook(sleep),
        pipe.transformer.register_forward_pre_hook(lambda *_: done.append(asleep.query())),
    ]
    call()
    torch.cuda.synchronize()
    for hook in hooks:
        hook.remove()
    return done[0]


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", ON_GPU.values(), ids=ON_GPU)
def test_the_host_is_at_the_first_step_before_the_gpu(tiny: Callable, draw: Callable, recipe: Recipe) -> None:
    plain, early = on_gpu(tiny, recipe)
    for pipe, done in ((plain, True), (early, False)):
        for options in ({}, {"batch": 2}, {"latents": noise(pipe).cpu()}):
            draw(pipe, steps=2, **options)  # graphs are captured, kernels loaded, memory pinned
            assert done_at_first_step(pipe, lambda p=pipe, o=options: draw(p, steps=2, **o)) is done


@pytest.mark.gpu
def test_so_it_is_with_an_image_to_edit(tiny: Callable, draw: Callable) -> None:
    plain, early = on_gpu(tiny, SEARCHLESS, as_kontext)
    images = [draw(pipe, steps=2, **edit()) for pipe in (plain, early)]
    assert np.array_equal(*images)
    assert done_at_first_step(plain, lambda: draw(plain, steps=2, **edit()))
    assert not done_at_first_step(early, lambda: draw(early, steps=2, **edit()))


@pytest.mark.gpu
def test_latents_that_the_gpu_has_yet_to_compute(tiny: Callable, draw: Callable) -> None:
    plain, early = on_gpu(tiny, replace(SEARCHLESS, dtype="bfloat16"))
    given = noise(plain)
    expected = draw(plain, steps=2, latents=given, output_type="latent")
    for dtype in (torch.bfloat16, torch.float32):
        halves = given.to(dtype) / 2
        torch.cuda.synchronize()
        torch.cuda._sleep(10**9)
        got = draw(early, steps=2, latents=halves * 2, output_type="latent")
        assert torch.equal(got, expected)
