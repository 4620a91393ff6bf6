"""Errors of recipes against float32."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline

import recipes
from benchmark import errors
from recipes.recipe import Recipe
from utils.request import Request

CPU = torch.device("cpu")
SMALL = ("--height", 64, "--width", 48, "--steps", 6)


@pytest.fixture
def measured(main: Callable, tmp_path: Path) -> Callable[..., dict[str, dict[str, Any]]]:
    """measured(*recipes): the rows by name of one command that measures all of them."""

    def run(*texts: str) -> dict[str, dict[str, Any]]:
        path = tmp_path / "errors.json"
        ended = main("benchmark.errors", *texts, *SMALL, "--output", path)
        assert ended.code == 0, ended.err
        return {row["recipe"]["name"]: row for row in json.loads(path.read_text())["errors"]}

    return run


def test_float8_loses_more_than_bfloat16_and_float32_nothing(measured: Callable) -> None:
    exact, float8, text = "fp32,scheduler_sync_removal=true", "bf16,quantization=float8_per_row", "float8_text_encoder"
    rows = measured(exact, float8, f"bf16,{text}=true")
    assert list(rows) == ["fp32", "bf16", exact, float8, f"bf16,{text}=true"]
    assert "relative_error" not in rows["fp32"]
    assert rows[exact]["relative_error"] == {"step": [0, 0], "latents": [0, 0], "decoded": [0, 0]}
    assert rows[exact]["within_limit"] is True
    assert rows["bf16"]["ratio"] == {"step": 1, "latents": 1, "decoded": 1}
    assert rows["bf16"]["within_limit"] is True
    of_bf16 = rows["bf16"]["relative_error"]
    assert all(1e-3 < error < 0.05 for of_kind in of_bf16.values() for error in of_kind)
    assert of_bf16["step"][0] != of_bf16["step"][1]
    assert rows[float8]["ratio"]["decoded"] == 1, "the decoder is not quantized"
    for kind in ("step", "latents"):
        ratio = rows[float8]["ratio"][kind]
        assert ratio > 2
        assert ratio == pytest.approx(sum(rows[float8]["relative_error"][kind]) / sum(of_bf16[kind]))
    assert rows[float8]["within_limit"] is None
    # The text encoders are in the whole call's error, and not in the step's.
    assert rows[f"bf16,{text}=true"]["relative_error"]["step"] == of_bf16["step"]
    assert rows[f"bf16,{text}=true"]["relative_error"]["latents"] != of_bf16["latents"]


def test_a_lossless_recipe_that_is_wrong_is_found_out(measured: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of the transformer's weights, or of the decoder's, is 5 % off after the recipe was applied."""
    apply = recipes.apply

    def apply_wrongly(pipe: DiffusionPipeline, recipe: Recipe) -> dict[str, str]:
        done = apply(pipe, recipe)
        if recipe.fused_qkv:
            pipe.transformer.proj_out.weight.data.mul_(1.05)
        if recipe.channels_last:
            pipe.vae.decoder.conv_out.weight.data.mul_(1.05)
        return done

    monkeypatch.setattr(recipes, "apply", apply_wrongly)
    in_step, in_decoder = "bf16,fused_qkv=true", "bf16,channels_last=true"
    rows = measured(in_step, in_decoder, "bf16,modulation=hoisted,hoisted_embeddings=true")
    for wrong, where in ((in_step, {"step", "latents"}), (in_decoder, {"decoded"})):
        assert rows[wrong]["within_limit"] is False
        assert {kind for kind, ratio in rows[wrong]["ratio"].items() if ratio > 3} == where
    assert rows["bf16,modulation=hoisted,hoisted_embeddings=true"]["within_limit"] is True


@pytest.mark.slow
def test_a_compiled_recipe_errs_about_as_much_as_eager(measured: Callable) -> None:
    """By how much is up to chance: two inputs at a size that the embedded model wasn't trained on."""
    recipe = "bf16,execution=compile,modulation=hoisted"
    row = measured(recipe)[recipe]
    assert "torch.compile" in row["applied"]["execution"]
    assert all(0.5 < ratio < 2 for ratio in row["ratio"].values())
    assert row["within_limit"] is (max(row["ratio"].values()) <= 1.1)


def test_all_results_are_at_most_1_1() -> None:
    baseline = {"step": 0.01, "latents": 0.02, "decoded": 0.03}
    most = {"step": 0.0109, "latents": 0.0219, "decoded": 0.0329}
    assert errors.against(baseline, most, lossless=True)["within_limit"] is True
    for name in errors.MEASURED:
        assert errors.against(baseline, {**most, name: 0.04}, lossless=True)["within_limit"] is False
    assert errors.against(baseline, dict.fromkeys(most, 1.0), lossless=False)["within_limit"] is None


def test_weights_and_inputs_are_the_same_numbers_in_both_dtypes(tiny: Callable[..., DiffusionPipeline]) -> None:
    pipe, exact = errors.load("tiny", CPU), errors.load("tiny", CPU)
    recipes.apply(exact, recipes.parse("fp32"))
    for name in ("transformer", "text_encoder", "text_encoder_2"):
        pairs = zip(getattr(pipe, name).parameters(), getattr(exact, name).parameters(), strict=True)
        for rounded, same in pairs:
            assert (rounded.dtype, same.dtype) == (torch.bfloat16, torch.float32)
            assert torch.equal(rounded.float(), same)
    inputs = errors.Inputs.of(exact, Request("a red circle", 64, 48, 1, 0.0, 64, seed=3))
    assert inputs.noise.shape == (1, 4 * 3, 64)
    for tensor in (inputs.noise, inputs.prompt_embeds, inputs.pooled_prompt_embeds):
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor.bfloat16().float(), tensor)

    # The noise is what the pipeline draws from the same seed.
    options = {"height": 64, "width": 48, "output_type": "latent", "num_inference_steps": 1, "guidance_scale": 0.0}
    options |= {"prompt": "a red circle", "max_sequence_length": 64}
    own = tiny()(**options, generator=torch.Generator().manual_seed(3)).images
    given = tiny()(**options, latents=inputs.noise).images
    assert (own - given).norm() / own.norm() < 0.01


def test_nothing_is_compared_with_what_failed(main: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load = errors.checkpoints.load
    calls = []

    def out_of_memory(*arguments: Any, **options: Any) -> DiffusionPipeline:
        calls.append(arguments)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return load(*arguments, **options)

    monkeypatch.setattr(errors.checkpoints, "load", out_of_memory)
    ended = main("benchmark.errors", "compiled", *SMALL, "--output", tmp_path / "errors.json")
    assert ended.code == 1
    assert ended.error() == "error: not measured: fp32; bf16; compiled"
    rows = json.loads((tmp_path / "errors.json").read_text())["errors"]
    assert rows[0]["failed"] == "OutOfMemoryError: CUDA out of memory."
    assert all("nothing to compare with: fp32" in row["failed"] for row in rows[1:])
    assert len(calls) == 1


def test_results_that_are_not_finite_are_refused(tiny: Callable[..., DiffusionPipeline]) -> None:
    pipe = tiny()
    inputs = errors.Inputs.of(pipe, Request("a red circle", 64, 48, 1, 0.0, 64))
    with torch.no_grad():
        pipe.transformer.proj_out.bias[0] = torch.nan
    with pytest.raises(errors.UserError, match="step: 12 of 768 values are not finite"):
        errors.results(pipe, torch.float32, inputs)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--prompts", 0), "--prompts 0: give at least 1"),
        (("--steps", 0), "--steps 0: give at least 1"),
        (("--height", 65), "--height 65 is not a positive multiple of 16"),
        (("fp8",), "unknown recipe 'fp8'"),
        (("no_scheduler_sync,cuda_graph=true,loop_graph=true",), "gives no step to measure, leave loop_graph=true out"),
        (("--checkpoint", "random/flux-kontext-dev"), "edits an image"),
        (("--output", "no/such/folder.json"), "the folder no/such does not exist"),
    ],
)
def test_bad_usage(main: Callable, tmp_path: Path, arguments: tuple, words: str) -> None:
    ended = main("benchmark.errors", "--output", tmp_path / "a.json", *arguments)
    assert ended.code == 2
    assert words in ended.error()
    assert list(tmp_path.iterdir()) == []
