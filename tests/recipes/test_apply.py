"""Putting recipes into effect on pipelines that a user has."""

from __future__ import annotations

import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, FluxKontextPipeline, UNet2DModel
from PIL import Image

import recipes
from recipes import FirstBlockCache, Recipe, RecipeError
from recipes.apply import OPTIMIZATIONS

CPU = torch.device("cpu")


def state(pipe: object) -> dict[str, tuple]:
    """All that applying may change: classes, dtypes, strides, names and processors."""
    modules = {name: value for name, value in pipe.components.items() if isinstance(value, torch.nn.Module)}
    tensors = {
        f"{part}.{name}": (tensor.dtype, tensor.stride(), tensor.data_ptr())
        for part, module in modules.items()
        for name, tensor in module.state_dict().items()
    }
    processors = {name: (type(p), vars(p).copy()) for name, p in pipe.transformer.attn_processors.items()}
    return {**tensors, **processors, "scheduler": (pipe.scheduler, type(pipe.scheduler)), "own": tuple(vars(pipe))}


def test_returns_what_was_applied(tiny: Callable) -> None:
    recipe = Recipe(dtype="bfloat16", fused_qkv=True, channels_last=True, cache=FirstBlockCache(0.1))
    applied = recipes.apply(tiny(), recipe)
    assert applied == {
        "dtype": "bfloat16",
        "scheduler_sync_removal": "one sync at the first step",
        "fused_qkv": applied["fused_qkv"],
        "channels_last": "vae",
        "cache": "first-block cache, threshold 0.1",
    }
    # Two double blocks with two each, four single blocks, the VAE's two attentions.
    assert applied["fused_qkv"].startswith("10 projections fused")


def test_covers_every_field_once() -> None:
    fields = [optimization.field for optimization in OPTIMIZATIONS]
    options_of_compiling = ["compile_scope", "max_autotune", "inductor_flags"]
    assert sorted([*fields, *options_of_compiling]) == sorted(Recipe.__dataclass_fields__)


def test_refused_optimization_raises_and_changes_nothing(tiny: Callable, draw: Callable) -> None:
    pipe = tiny()
    image, before = draw(pipe), state(pipe)
    asked = recipes.parse("bf16,attention=fa3_fp8,fused_qkv=true,channels_last=true")
    with pytest.raises(RecipeError, match="attention=fa3_fp8 needs a cuda device, this is cpu") as raised:
        recipes.apply(pipe, asked)
    assert state(pipe) == before
    assert np.array_equal(draw(pipe), image)
    _, _, name = str(raised.value).partition("--recipe ")
    nearest = recipes.parse(name)
    assert nearest == asked.without("attention")
    assert recipes.apply(pipe, nearest)["channels_last"] == "vae"


@pytest.mark.parametrize("name", [*recipes.named(), "bf16,attention=cudnn", "compiled,attention=fa3_fp8"])
def test_nearest_recipe_runs_here(name: str) -> None:
    recipe = recipes.parse(name)
    nearest = recipes.nearest(recipe, CPU)
    assert recipes.refusal(nearest, CPU) is None
    refused = recipes.refusal(recipe, CPU) is not None
    assert (nearest != recipe) == refused == (recipe.attention != "native")


def test_applying_twice_raises(tiny: Callable) -> None:
    pipe = tiny()
    recipes.apply(pipe, Recipe())
    with pytest.raises(RecipeError, match="load the pipeline again"):
        recipes.apply(pipe, Recipe(dtype="bfloat16"))
    assert pipe.transformer.dtype == torch.float32


def test_kontext_pipeline(tiny: Callable, draw: Callable) -> None:
    plain = FluxKontextPipeline(**tiny().components)
    plain.set_progress_bar_config(disable=True)
    changed = FluxKontextPipeline(**tiny().components)
    changed.set_progress_bar_config(disable=True)
    recipes.apply(changed, Recipe(scheduler_sync_removal=True, fused_qkv=True, channels_last=True))
    image = Image.radial_gradient("L").resize((48, 80)).convert("RGB")
    options = {"image": image, "max_area": 64 * 64, "_auto_resize": False}
    np.testing.assert_allclose(draw(changed, **options), draw(plain, **options), atol=1e-4)


def test_refuses_other_pipelines() -> None:
    unet = UNet2DModel(8, block_out_channels=(32,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",))
    with pytest.raises(RecipeError, match="DDPMPipeline has no FluxTransformer2DModel"):
        recipes.apply(DDPMPipeline(unet, DDPMScheduler()), Recipe(dtype="bfloat16"))
    assert unet.dtype == torch.float32


def test_fastest_leaves_out_what_is_refused_or_emulated() -> None:
    fastest = recipes.fastest(CPU)
    assert recipes.refusal(fastest, CPU) is None
    assert fastest.attention == "native", "FlashAttention-3 needs a GPU"
    assert fastest.quantization == "none", "float8 is emulated on a CPU"
    assert fastest.dtype == "bfloat16"
    rungs = [name for name, recipe in recipes.named().items() if recipe.channels_last]
    assert not recipes.fastest(CPU, rungs).channels_last


def test_fastest_is_nothing_that_has_to_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules["recipes.apply"]  # `recipes.apply` is its function
    for name in ("refusal", "not_timed"):
        monkeypatch.setattr(module, name, lambda *_: None)
    top = recipes.fastest(CPU)
    assert top.execution == "aoti"
    assert top.cuda_graph
    assert not top.loop_graph
    assert recipes.fastest(CPU, {"aoti"}) == recipes.named()["int8_adaln"], "the rung that aoti stands on"
    assert recipes.fastest(torch.device("cuda")) == top, "packages on a GPU, too"


def test_lossless() -> None:
    lossy = [name for name, recipe in recipes.named().items() if not recipes.is_lossless(recipe)]
    names = list(recipes.named())
    assert lossy == names[names.index("fa3_fp8") :]
    assert not recipes.is_lossless(Recipe(cache=FirstBlockCache()))
