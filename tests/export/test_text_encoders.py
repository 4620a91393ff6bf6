"""CLIP's and T5's layers from packages of their own."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline

import recipes
from export import order, tables
from export.manifest import content_key, identify
from export.order import Order
from export.runtime import announce, library_of
from export.store import Entry, PackageStore
from export.verify import verify
from recipes import Recipe
from utils import environment
from utils.compile_clock import CompileClock
from utils.errors import UserError
from utils.request import Request

AOTI = Recipe(dtype="bfloat16", execution="aoti", compiled_text_encoders=True)
IN_FLOAT8 = replace(AOTI, float8_text_encoder=True)
CPU = torch.device("cpu")
PROMPTS = ["a red circle", "two blue squares above a white star", "three green crosses"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("text-encoders")


@pytest.fixture(scope="module")
def built(folder: Path) -> list[tuple[Entry, bool]]:
    wanted = Order("tiny", AOTI, resolutions=((64, 64),), batches=(1,), text_lengths=(64,))
    return order.fill(wanted, folder, CPU)


def encoded(pipe: DiffusionPipeline, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """T5's [n, 64, features] and CLIP's [n, features]."""
    with torch.no_grad():
        t5, clip, _ = pipe.encode_prompt(prompts, None, max_sequence_length=64)
    return t5, clip


def applied(tiny: Callable, recipe: Recipe, store: PackageStore) -> DiffusionPipeline:
    pipe = tiny(torch.bfloat16)
    assert recipes.apply(pipe, recipe, store)["compiled_text_encoders"] == "CLIP's and T5's layers from packages"
    return pipe


@pytest.mark.slow
def test_a_package_of_three_small_models(built: list[tuple[Entry, bool]]) -> None:
    (image, _), (text, was_there) = built
    assert not was_there
    assert {model.region for model in image.manifest.models.values()} >= {"double_block", "vae_decoder"}
    assert sorted(model.region for model in text.manifest.models.values()) == [
        "clip_layer", "t5_first_layer", "t5_layer",
    ]  # fmt: skip
    assert text.path.name.startswith("text_encoders-")
    assert text.beside.size < 2e6
    assert all(model.weights_sha256 is None for model in text.manifest.models.values()), "no weights in it"
    assert tables.line(text).startswith(f"{text.path}: encodes 64 text tokens; ")
    assert tables.line(text).endswith(": clip_layer, t5_first_layer, t5_layer")
    assert re.findall(r"^  (\w+): \w+=", tables.description(text), re.M) == ["text_encoder", "text_encoder_2"]
    assert re.findall(r"^  (\w+): \w+=", tables.description(image), re.M) == ["transformer", "vae"]
    identity = text.manifest.identity
    assert identity.transformers == environment.version("transformers")
    assert identity.architecture["text_encoder_2"]["d_model"] == 256


@pytest.mark.slow
def test_another_size_of_image_has_the_same(built: list[tuple[Entry, bool]], folder: Path) -> None:
    wanted = Order("tiny", AOTI, resolutions=((96, 64),), batches=(1,), text_lengths=(64,))
    (_, image_was_there), (entry, text_was_there) = order.fill(wanted, folder, CPU)
    assert (image_was_there, text_was_there) == (False, True)
    assert entry == built[1][0]


@pytest.mark.slow
def test_any_number_of_prompts_as_eagerly(
    tiny: Callable, draw: Callable, error_of: Callable, built: list[tuple[Entry, bool]], folder: Path
) -> None:
    plain, pipe = tiny(torch.bfloat16), applied(tiny, AOTI, PackageStore(folder, build=False))
    with CompileClock() as clock:
        draw(pipe, steps=2)
        for prompts in (PROMPTS, PROMPTS[1:2]):
            for ours, theirs in zip(encoded(pipe, prompts), encoded(plain, prompts), strict=True):
                assert error_of(ours, theirs) < 5e-3
    assert clock.compilations == 0
    library = library_of(pipe)
    text = [one for one in library.packaged if one.region.component.startswith("text_encoder")]
    assert len(text) == 4, "two layers each"
    assert all(len(one.bound) == 1 for one in text)


@pytest.mark.slow
def test_float8_built_at_the_first_call(tiny: Callable, error_of: Callable, tmp_path: Path) -> None:
    plain = tiny(torch.bfloat16)
    recipes.apply(plain, Recipe(dtype="bfloat16", float8_text_encoder=True))
    pipe = applied(tiny, IN_FLOAT8, PackageStore(tmp_path))
    ours_t5, _ = own = encoded(pipe, PROMPTS)
    for ours, theirs in zip(own, encoded(plain, PROMPTS), strict=True):
        assert error_of(ours, theirs) < 5e-3
    assert torch.equal(pipe.encode_prompt(PROMPTS, None, max_sequence_length=64)[0], ours_t5), "with gradients enabled"
    library = library_of(pipe)
    entries = library.store.entries()
    assert len(entries) == 3
    errors = [error for entry in entries for error in verify(entry, library)]
    assert all(error.ok for error in errors)
    assert {error.tolerance for error in errors} == {2e-2, 1e-1}
    # Of another image's recipe CLIP's fits, T5's in bfloat16 doesn't.
    other = applied(tiny, replace(AOTI, fused_qkv=True), PackageStore(tmp_path, build=False))
    with pytest.raises(
        UserError,
        match=r"encodes 64 text tokens \(region t5_first_layer\).* was built for float8_text_encoder=true",
    ):
        encoded(other, PROMPTS)


def test_missing_ones_are_refused_with_the_sizes_of_what_was_announced(tiny: Callable, tmp_path: Path) -> None:
    pipe = applied(tiny, AOTI, PackageStore(tmp_path, build=False))
    words = (
        r"no package in \S+ encodes 77 text tokens \(region clip_layer\): .*, or build one with `python -m "
        r"export build --checkpoint tiny --recipe \S+ --resolutions {} --out \S+`"
    )
    for sizes in ("HEIGHTxWIDTH --text-lengths TOKENS --batch 1", "64x96 --text-lengths 32 --batch 2"):
        with pytest.raises(UserError) as raised:
            encoded(pipe, PROMPTS)
        assert re.fullmatch(words.format(sizes), str(raised.value))
        with pytest.raises(UserError, match=r"draws 64x96, batch 2, 32 text tokens \(region vae_decoder\)"):
            announce(pipe, Request("a red circle", 64, 96, 2, 0.0, 32, 2))


def test_what_packages_take_no_account_of_is_refused(tiny: Callable, tmp_path: Path) -> None:
    pipe = applied(tiny, AOTI, PackageStore(tmp_path))
    tokens = torch.ones(1, 64, dtype=torch.int64)
    mask = torch.tensor([[1] * 60 + [0] * 4])
    with torch.no_grad(), pytest.raises(UserError, match="the packaged t5_first_layer takes no attention_mask"):
        pipe.text_encoder_2(tokens, attention_mask=mask)


def test_what_shapes_an_encoders_layer(tiny: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """And, of what does, what shapes the image's models."""
    pipe = tiny(torch.bfloat16)
    here = identify(pipe, AOTI)

    def same(component: str, **changes: Any) -> bool:
        other = identify(pipe, replace(AOTI, **changes))
        equal = content_key(other, {component}, {}) == content_key(here, {component}, {})
        assert (other.refusal(here, component) is None) == equal
        return equal

    for component in ("text_encoder", "text_encoder_2"):
        assert same(component, quantization="float8_per_row", fused_qkv=True, channels_last=True, cuda_graph=True)
        assert not same(component, max_autotune=True)
    assert same("text_encoder", float8_text_encoder=True)
    assert not same("text_encoder_2", float8_text_encoder=True)
    for component in ("transformer", "vae"):
        assert same(component, float8_text_encoder=True)
        assert same(component, compiled_text_encoders=False)
    monkeypatch.setattr(environment, "version", lambda package: f"{package} of tomorrow")
    reason = identify(pipe, AOTI).refusal(here, "text_encoder")
    assert reason is not None
    assert reason.startswith("was built for transformers transformers of tomorrow, this is ")
