"""CLIP and T5 compiled a layer at a time, as CUDA graphs, and T5 in float8."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import recipes
from export.store import PackageStore
from recipes import Recipe
from recipes.text_encoders import encoders
from tiny_flux.score import held_out_prompts

COMPILED = Recipe(dtype="bfloat16", execution="compile", compiled_text_encoders=True)
IN_FLOAT8 = replace(COMPILED, float8_text_encoder=True)
CAPTURED = {"cuda_graph": True}


def prompts(count: int) -> list[list[str]]:
    """So many batches of 50, the benchmark's."""
    texts = [prompt.text for prompt in held_out_prompts(50 * count, 0)]
    return [texts[i : i + 50] for i in range(0, len(texts), 50)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("device", "fields"),
    [
        ("cpu", {}),
        ("cpu", {"compile_scope": "whole"}),
        pytest.param("cuda", {}, marks=pytest.mark.gpu),
        pytest.param("cuda", CAPTURED, marks=pytest.mark.gpu),
        pytest.param("cuda", {**CAPTURED, "compile_scope": "whole"}, marks=pytest.mark.gpu),
        pytest.param("cuda", {**CAPTURED, "execution": "aoti"}, marks=pytest.mark.gpu),
    ],
)
def test_float8_t5_encodes_each_prompt_of_a_batch_as_eagerly(
    tiny: Callable, error_of: Callable, tmp_path: Path, device: str, fields: dict
) -> None:
    """Every time the same, too; as one graph, T5 encoded some prompts anew at each call."""
    eager, pipe = (tiny(torch.bfloat16, torch.device(device)) for _ in range(2))
    recipes.apply(eager, Recipe(dtype="bfloat16", float8_text_encoder=True))
    recipes.apply(pipe, replace(IN_FLOAT8, **fields), PackageStore(tmp_path))

    def encoded(one: object, texts: list[str]) -> torch.Tensor:
        with torch.no_grad():
            return one._get_t5_prompt_embeds(texts, max_sequence_length=512 if device == "cuda" else 64)

    for texts in prompts(3 if device == "cuda" else 1):
        first, plain = encoded(pipe, texts), encoded(eager, texts)
        for ours, theirs in zip(first, plain, strict=True):
            assert error_of(ours, theirs) < 0.03  # float8 instead of bfloat16 is 0.016 to 0.04
        for _ in range(8):
            assert torch.equal(encoded(pipe, texts), first)


def test_a_capture_calls_the_layers_as_the_calls_before_it(tiny: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers makes a mask only where it needs one, and before 5.23 in every capture, where nothing can be
    compiled for it."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: torch._dynamo.optimize("eager")(function))
    pipe = tiny()
    recipes.apply(pipe, replace(COMPILED, dtype="float32"))
    tokens = torch.ones(1, 64, dtype=torch.int64)
    with torch.no_grad():
        before = [encoder(tokens)[0] for encoder in encoders(pipe).values()]
        monkeypatch.setattr("transformers.utils.import_utils.is_cuda_stream_capturing", lambda: True)
        with torch._dynamo.config.patch(error_on_recompile=True):
            captured = [encoder(tokens)[0] for encoder in encoders(pipe).values()]
    assert all(torch.equal(*pair) for pair in zip(before, captured, strict=True))
