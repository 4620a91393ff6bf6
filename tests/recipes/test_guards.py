"""Pipelines that a recipe would do wrong by, and what would go by a recipe afterwards: refused in one line."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FirstBlockCacheConfig, FluxImg2ImgPipeline, FluxPipeline
from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor
from PIL import Image

import recipes
from recipes import Recipe, RecipeError, attention, cuda_graph, execution, fused_kernels
from utils.components import modules
from utils.errors import UsageError

PLAIN = Recipe(dtype="bfloat16", scheduler_sync_removal=True)
FUSED, HOISTED = replace(PLAIN, fused_qkv=True), replace(PLAIN, hoisted_embeddings=True)
MODULATION, FLOAT8 = replace(PLAIN, modulation="hoisted"), replace(PLAIN, quantization="float8_per_row")
COMPILED, AOTI = replace(PLAIN, execution="compile"), replace(PLAIN, execution="aoti")
LAYER = "transformer_blocks.0.attn.to_q"


def lora() -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    return {
        f"transformer.{LAYER}.lora_A.weight": torch.randn(16, 256, generator=random),
        f"transformer.{LAYER}.lora_B.weight": torch.randn(256, 16, generator=random),
    }


@pytest.mark.parametrize("missing", [("text_encoder",), ("text_encoder", "text_encoder_2", "vae")])
def test_missing_components_are_named(tiny: Callable, missing: tuple[str, ...]) -> None:
    pipe = tiny()
    for name in missing:
        setattr(pipe, name, None)
    recipe = replace(COMPILED, compiled_text_encoders=True, channels_last=True)
    words = "compiled_text_encoders=True needs the pipeline's text_encoder"
    if "vae" in missing:
        words = "channels_last=True needs the pipeline's vae"
    with pytest.raises(RecipeError, match=f"{words}, which isn't there; the nearest recipe.*--recipe ") as raised:
        recipes.apply(pipe, recipe)
    assert recipes.applied(pipe) is None
    nearest = recipes.parse(str(raised.value).partition("--recipe ")[2].strip("'"))
    assert nearest == replace(COMPILED, channels_last="vae" not in missing)


def test_pipeline_of_a_transformer_alone(tiny: Callable, draw: Callable) -> None:
    """As one that gets embeddings and gives latents."""
    plain = tiny()
    with torch.no_grad():
        prompt, pooled, _ = plain.encode_prompt("a red circle", None, max_sequence_length=64)
    parts = {"vae": None, "text_encoder": None, "text_encoder_2": None, "tokenizer": None, "tokenizer_2": None}
    pipe = FluxPipeline(**{**tiny().components, **parts})
    pipe.set_progress_bar_config(disable=True)
    recipes.apply(pipe, Recipe(fused_qkv=True, modulation="hoisted", hoisted_embeddings=True))
    given = {"prompt": None, "prompt_embeds": prompt, "pooled_prompt_embeds": pooled, "output_type": "latent"}
    torch.testing.assert_close(draw(pipe, **given), draw(plain, **given), atol=1e-4, rtol=0)


@pytest.mark.parametrize("recipe", [FUSED, MODULATION, FLOAT8, AOTI], ids=["fused", "hoisted", "float8", "aoti"])
def test_lora_that_would_be_left_out(tiny: Callable, recipe: Recipe) -> None:
    pipe = tiny()
    pipe.load_lora_weights(lora())
    with pytest.raises(RecipeError, match="LoRA layers: call fuse_lora and unload_lora_weights before") as raised:
        recipes.apply(pipe, recipe)
    assert "--recipe no_scheduler_sync" in str(raised.value)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    recipes.apply(pipe, recipe)
    with pytest.raises(UsageError, match=r"use export\.lora\.Adapter"):
        pipe.load_lora_weights(lora())


def test_lora_where_nothing_leaves_it_out(tiny: Callable, draw: Callable) -> None:
    plain, before, after = tiny(), tiny(), tiny()
    recipe = replace(HOISTED, dtype="float32", channels_last=True)
    recipes.apply(after, recipe)
    for pipe in (plain, before, after):
        pipe.load_lora_weights(lora(), adapter_name="style")
    recipes.apply(before, recipe)
    without = draw(tiny())
    for scale in (1.0, 0.3):
        for pipe in (plain, before, after):
            pipe.set_adapters(["style"], [scale])
        expected = draw(plain)
        assert np.abs(expected - without).max() > 1e-2
        for pipe in (before, after):
            np.testing.assert_allclose(draw(pipe), expected, atol=1e-4)


HOOKS: dict[str, Callable[[Any], None]] = {
    "cache": lambda pipe: pipe.transformer.enable_cache(FirstBlockCacheConfig()),
    "offloading": lambda pipe: pipe.enable_model_cpu_offload(device="cpu"),
    "group-offloading": lambda pipe: pipe.transformer.enable_group_offload(
        onload_device=torch.device("cpu"), offload_type="leaf_level"
    ),
    "layerwise-casting": lambda pipe: pipe.transformer.enable_layerwise_casting(torch.float8_e4m3fn, torch.bfloat16),
}


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("recipe", [HOISTED, COMPILED, AOTI], ids=["hoisted", "compiled", "aoti"])
def test_hooks_that_would_be_lost(tiny: Callable, recipe: Recipe, hook: str) -> None:
    pipe = tiny(torch.bfloat16)
    HOOKS[hook](pipe)
    with pytest.raises(RecipeError, match=r"needs a pipeline without hooks, .* --recipe no_scheduler_sync$"):
        recipes.apply(pipe, recipe)
    recipes.apply(pipe, PLAIN)


@pytest.mark.parametrize("hook", [name for name in HOOKS if name != "cache"])
def test_hooks_afterwards(tiny: Callable, hook: str) -> None:
    pipe = tiny(torch.bfloat16)
    recipes.apply(pipe, HOISTED)
    with pytest.raises(UsageError, match="after a recipe: what it compiled, captured or hoisted needs its weights"):
        HOOKS[hook](pipe)


def test_calls_leave_no_hooks(tiny: Callable, draw: Callable) -> None:
    pipe = tiny(torch.bfloat16)
    draw(pipe)
    recipes.apply(pipe, HOISTED)


@pytest.mark.parametrize("optimization", [attention.OPTIMIZATION, fused_kernels.OPTIMIZATION, execution.OPTIMIZATION])
def test_ip_adapter_that_would_be_taken_away(tiny: Callable, pretend_gpu: Callable, optimization: Any) -> None:
    pipe, cuda = tiny(torch.bfloat16), torch.device("cuda")
    pretend_gpu((9, 0))
    recipe = replace(FUSED, attention="cudnn", fused_kernels=True, execution="aoti")
    assert optimization.refusal(recipe, cuda, pipe) is None
    adapted = FluxIPAdapterAttnProcessor(256, 256, num_tokens=(4,))
    processors = {name: adapted if name.startswith("t") else p for name, p in pipe.transformer.attn_processors.items()}
    pipe.transformer.set_attn_processor(processors)
    assert "would take FluxIPAdapterAttnProcessor away" in optimization.refusal(recipe, cuda, pipe)


def test_what_a_graph_would_hold_is_refused_beside_it(tiny: Callable, pretend_gpu: Callable) -> None:
    pipe, cuda = tiny(torch.bfloat16), torch.device("cuda")
    recipe = replace(PLAIN, cuda_graph=True)
    pretend_gpu((9, 0))
    assert cuda_graph.OPTIMIZATION.refusal(recipe, cuda, pipe) is None
    pipe.load_lora_weights(lora())
    assert "needs a transformer without LoRA layers" in cuda_graph.OPTIMIZATION.refusal(recipe, cuda, pipe)


def test_another_pipeline_of_the_same_transformer(tiny: Callable, draw: Callable) -> None:
    recipe = Recipe(fused_qkv=True, modulation="hoisted", hoisted_embeddings=True)
    plain, pipe = tiny(), tiny()
    recipes.apply(pipe, recipe)
    other, plain_other = (FluxImg2ImgPipeline.from_pipe(one) for one in (pipe, plain))
    with pytest.raises(RecipeError, match="applied to this pipeline already"):
        recipes.apply(other, recipe)
    assert recipes.applied(other) == recipe
    for one in (other, plain_other):
        one.set_progress_bar_config(disable=True)
    options = {"image": Image.radial_gradient("L").resize((64, 64)).convert("RGB"), "strength": 0.5, "steps": 4}
    np.testing.assert_allclose(draw(other, **options), draw(plain_other, **options), atol=1e-4)
    np.testing.assert_allclose(draw(pipe, steps=2), draw(plain, steps=2), atol=1e-4)


@pytest.mark.parametrize("recipe", [HOISTED, MODULATION, COMPILED, AOTI])
def test_copies_would_run_the_originals_weights(tiny: Callable, recipe: Recipe) -> None:
    pipe = tiny(torch.bfloat16)
    recipes.apply(pipe, recipe)
    for owner in (pipe, pipe.transformer, pipe.vae):
        with pytest.raises(UsageError, match=r"copy\.deepcopy after a recipe: a copy would run the weights of the"):
            copy.deepcopy(owner)


def test_copies_of_weights_are_copies(tiny: Callable, draw: Callable) -> None:
    pipe = tiny()
    recipes.apply(pipe, Recipe(fused_qkv=True, channels_last=True))
    copied = copy.deepcopy(pipe)
    assert np.array_equal(draw(copied), draw(pipe))
    copied.transformer.proj_out.weight.data.mul_(2)
    assert np.abs(draw(copied) - draw(pipe)).max() > 1e-3


@pytest.mark.parametrize("recipe", [FUSED, FLOAT8, replace(PLAIN, float8_text_encoder=True)])
def test_saving_what_could_not_be_read(tiny: Callable, recipe: Recipe, tmp_path: Path) -> None:
    pipe = tiny(torch.bfloat16)
    recipes.apply(pipe, recipe)
    part = pipe.text_encoder_2 if recipe.float8_text_encoder else pipe.transformer
    for owner in (pipe, part):
        with pytest.raises(UsageError, match="save_pretrained after a recipe: from_pretrained could not read"):
            owner.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_saving_weights_as_diffusers_has_them(tiny: Callable, draw: Callable, tmp_path: Path) -> None:
    pipe = tiny()
    recipes.apply(pipe, Recipe(channels_last=True, modulation="hoisted", hoisted_embeddings=True))
    pipe.save_pretrained(tmp_path)
    loaded = FluxPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    before, after = (modules(one) for one in (tiny(), loaded))
    assert before.keys() == after.keys()
    for name, part in before.items():
        weights = after[name].state_dict()
        assert part.state_dict().keys() == weights.keys()
        assert all(torch.equal(weight, weights[key]) for key, weight in part.state_dict().items())
    # Some processors round otherwise where memory is aligned otherwise.
    assert np.allclose(draw(loaded), draw(tiny()), atol=1e-5, rtol=0)
