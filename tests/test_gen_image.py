"""gen_image.py: an image from a command, and one clear line for everything that can be wrong."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import gen_image
from recipes import FirstBlockCache, InductorFlags, Recipe, command_line_name, named
from recipes.flux_fast_flags import recipe_from_flags
from utils import request

SMALL = ("--checkpoint", "tiny", "--recipe", "bf16", "--steps", 1, "--height", 64, "--width", 64)


def test_script_draws(script: Callable, tmp_path: Path) -> None:
    """From another folder, as a user would: first line the recipe, last line the timings."""
    done = script("gen_image.py", *SMALL, "--prompt", "a red circle", "--output", "out.png", cwd=tmp_path)
    assert done.code == 0, done.err
    first, *_, last = done.out.splitlines()
    assert first == "tiny on cpu, recipe bf16"
    assert last.startswith("out.png: loading ")
    assert last.endswith("(1 steps, 64x64)")
    assert any("loading: 100%" in line for line in done.lines)
    assert any("denoising: 100%" in line for line in done.lines)
    assert Image.open(tmp_path / "out.png").size == (64, 64)
    assert os.listdir(tmp_path) == ["out.png"]
    assert any(line.startswith("warning: tiny was trained at 256x256 alone") for line in done.err.splitlines())


def test_same_seed_same_image_and_batch_is_numbered(main: Callable, tmp_path: Path) -> None:
    def pixels(name: str) -> np.ndarray:
        return np.asarray(Image.open(tmp_path / name))

    assert main("gen_image", *SMALL, "--seed", 7, "--batch", 2, "--output", tmp_path / "a.png").code == 0
    assert sorted(os.listdir(tmp_path)) == ["a-1.png", "a.png"]
    assert main("gen_image", *SMALL, "--seed", 8, "--output", tmp_path / "b.png").code == 0
    assert main("gen_image", *SMALL, "--seed", 8, "--output", tmp_path / "c.png").code == 0
    assert np.array_equal(pixels("b.png"), pixels("c.png"))
    assert not np.array_equal(pixels("a.png"), pixels("a-1.png"))
    # The second image of the batch is that of the next seed, but for another order of additions in bfloat16.
    assert np.abs(pixels("a-1.png").astype(int) - pixels("b.png")).max() <= 16


def test_says_which_recipe_it_chose(main: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("recipes.fastest", lambda device, not_paying: named()["no_scheduler_sync"])
    done = main("gen_image", *SMALL[:2], *SMALL[4:], "--output", tmp_path / "a.png")
    assert done.out.splitlines()[0] == "tiny on cpu, recipe no_scheduler_sync (the fastest on this machine)"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--height", "100"], "--height 100 is not a positive multiple of 16: try 96 or 112"),
        (["--width", "250"], "--width 250 is not a positive multiple of 16: try 240 or 256"),
        (["--height", "0"], "--height 0 is not a positive multiple of 16"),
        (["--width", "-64"], "--width -64 is not a positive multiple of 16"),
        (["--height", "tall"], "argument --height: invalid int value: 'tall'"),
        (["--steps", "0"], "--steps 0: give at least 1"),
        (["--steps", "-3"], "--steps -3: give at least 1"),
        (["--batch", "0"], "--batch 0: give at least 1"),
        (["--batch", "-1"], "--batch -1: give at least 1"),
        (["--seed", "-1"], "--seed -1: give a number from 0"),
        (["--guidance", "nan"], "--guidance nan: give a finite number"),
        (["--prompt", ""], "the prompt is empty"),
        (["--prompt", "  "], "the prompt is empty"),
        (["--prompt"], "argument --prompt: expected one argument"),
        (["--image", "no.png"], "tiny takes no image: leave --image out"),
        (["--device", "tpu"], "argument --device: invalid choice: 'tpu'"),
        (["--checkpoint", "flux"], "unknown checkpoint 'flux'"),
        (["--checkpoint", "."], "isn't a diffusers pipeline: model_index.json"),
        (["--checkpoint", "random/flux-kontext-dev"], "edits an image: give one with --image"),
        (["--recipe", "fast"], "unknown recipe 'fast'"),
        (["--recipe", "bf16,dtype=int8"], "dtype is one of float32, bfloat16, not 'int8'"),
        (["--recipe", "bf16,attention=fa3_fp8"], "needs a cuda device, this is cpu; the nearest recipe that runs here"),
        (["--recipe", "bf16", "--disable_quant"], "--recipe and flux-fast's flags both choose a recipe"),
        (["--fast"], "unrecognized arguments: --fast"),
        (["--promt", "x"], "unrecognized arguments: --promt x: did you mean --prompt?"),
        (["--output", "missing/out.png"], "the folder missing does not exist: create it with `mkdir -p missing`"),
        (["--output", "/proc/out.png"], "the folder /proc is not writable"),
        (["--output", "."], "no image format is called"),
        (["--output", "out.docx"], "no image format is called '.docx'"),
    ],
)
def test_bad_usage(
    main: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    done = main("gen_image", *SMALL, *arguments)
    assert words in done.error()
    assert len(done.lines) == 1
    assert done.code == 2
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="here CUDA can be had")
def test_cuda_asked_for_and_absent(main: Callable) -> None:
    done = main("gen_image", *SMALL, "--device", "cuda")
    assert done.error() == "error: --device cuda: PyTorch sees no CUDA device here; use --device cpu or auto"
    assert done.code == 2


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--steps", "0"], 2, "--steps 0: give at least 1"),
        (["--no-such-flag"], 2, "unrecognized arguments: --no-such-flag"),
        (["--checkpoint", "black-forest-labs/FLUX.1-dev"], 1, "could not be downloaded: "),
    ],
)
def test_bad_input_in_a_fresh_process(
    script: Callable, tmp_path: Path, arguments: list[str], code: int, words: str
) -> None:
    """No library's log lines either. The last: a gated checkpoint without network or cache."""
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = script("gen_image.py", *SMALL, *arguments, "--output", str(tmp_path / "a.png"), **offline)
    assert words in done.error()
    assert len(done.lines) == 1, done.err
    assert done.code == code


def test_gated_checkpoint_without_a_token(main: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The Hub's answer can't be had here: its client is made to raise what it raises then."""
    from diffusers import FluxPipeline
    from huggingface_hub.errors import GatedRepoError

    def refuse(*_: object, **__: object) -> str:
        answer = SimpleNamespace(headers={}, request=None)
        raise GatedRepoError("401 Client Error.\n\nCannot access gated repo", response=answer)

    monkeypatch.setattr(FluxPipeline, "download", refuse)
    dev = ("--checkpoint", "black-forest-labs/FLUX.1-dev", "--output", tmp_path / "a.png")
    done = main("gen_image", *SMALL, *dev)
    assert "is gated: accept its licence on its Hugging Face page, then `hf auth login` or set HF_TOKEN" in done.error()
    assert done.code == 2


def test_corrupt_weights(main: Callable, tiny_copy: Path, tmp_path: Path) -> None:
    path = next((tiny_copy / "transformer").glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:1000])
    done = main("gen_image", *SMALL, "--checkpoint", tiny_copy, "--output", tmp_path / "a.png")
    assert f"could not load {tiny_copy}: " in done.error()
    assert "are its files whole?" in done.error()
    assert done.code == 1
    assert not (tmp_path / "a.png").exists()


def test_out_of_memory(main: Callable, tmp_path: Path) -> None:
    """8 million pixels a side is 2^40 tokens' worth of noise."""
    side = 2**23
    done = main("gen_image", *SMALL, "--height", side, "--width", side, "--output", tmp_path / "a.png")
    words = r"error: out of memory while drawing( \(peak .*\))?: use a smaller --height or --width"
    assert re.match(words, done.error())
    assert done.code == 1


def test_debug_shows_the_traceback_and_ends_on_the_same_line(script: Callable) -> None:
    done = script("gen_image.py", *SMALL, "--steps", 0, "--debug")
    assert done.code == 2
    assert "Traceback" in done.err
    assert "UsageError: --steps 0: give at least 1" in done.err
    assert done.err.splitlines()[-1] == "error: --steps 0: give at least 1"


def test_interrupted(main: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(request.Request, "run", interrupt)
    done = main("gen_image", *SMALL, "--output", tmp_path / "a.png")
    assert done.error() == "error: interrupted; nothing half-written was left behind"
    assert done.code == 130
    assert os.listdir(tmp_path) == []


def test_too_long_a_prompt_is_cut_with_a_warning(main: Callable, tmp_path: Path, tiny: Callable) -> None:
    prompt = "a red circle left of a blue square " * 12
    tokens = len(tiny().tokenizer_2(prompt).input_ids)
    done = main("gen_image", *SMALL, "--prompt", prompt, "--output", tmp_path / "a.png")
    assert done.code == 0
    warnings = [line for line in done.lines if "%|" not in line and "was trained at" not in line]
    assert warnings[0] == f"warning: the prompt has {tokens} T5 tokens, 64 fit: the last {tokens - 64} were cut"
    assert all(line.startswith("warning: the prompt has ") for line in warnings), "nothing said twice by the libraries"
    assert (tmp_path / "a.png").exists()
    fits = main("gen_image", *SMALL, "--prompt", "a red circle", "--output", tmp_path / "a.png")
    assert "were cut" not in fits.err


@pytest.mark.parametrize("size", [(48, 80), (80, 48), (50, 67), (5, 9), (300, 16)])
def test_kontext_takes_any_image_and_keeps_the_size_asked_for(
    main: Callable, kontext: Path, tmp_path: Path, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """size: width and height of the image. Nothing is scaled to a megapixel: the transformer sees as many tokens."""
    from diffusers import FluxTransformer2DModel

    tokens, forward = [], FluxTransformer2DModel.forward

    def counting(self, *args, **kwargs):
        tokens.append(kwargs["hidden_states"].shape[1])
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(FluxTransformer2DModel, "forward", counting)
    Image.radial_gradient("L").resize(size).save(tmp_path / "in.png")
    output = tmp_path / "out.png"
    options = (
        "--checkpoint",
        kontext,
        "--image",
        tmp_path / "in.png",
        "--height",
        48,
        "--width",
        80,
        "--output",
        output,
    )
    done = main("gen_image", *SMALL, *options)
    assert done.code == 0, done.err
    assert Image.open(output).size == (80, 48)
    drawn, given = (48 // 16) * (80 // 16), max(1, size[0] // 16) * max(1, size[1] // 16)
    assert tokens == [drawn + given]


def test_kontext_draws_a_batch_and_heeds_its_image(main: Callable, kontext: Path, tmp_path: Path) -> None:
    for name, color in (("white", "white"), ("black", "black")):
        Image.new("RGB", (64, 64), color).save(tmp_path / f"{name}.png")
        options = ("--checkpoint", kontext, "--image", tmp_path / f"{name}.png", "--batch", 2)
        assert main("gen_image", *SMALL, *options, "--output", tmp_path / f"{name}-out.png").code == 0
    white, black = (np.asarray(Image.open(tmp_path / f"{name}-out-1.png")) for name in ("white", "black"))
    assert white.shape == (64, 64, 3)
    assert not np.array_equal(white, black)


@pytest.mark.parametrize("content", [None, b"", b"not an image", b"\x89PNG\r\n\x1a\n" + bytes(20), "folder"])
def test_kontext_with_an_unreadable_image(main: Callable, kontext: Path, tmp_path: Path, content: object) -> None:
    path = tmp_path / "in.png"
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    done = main("gen_image", *SMALL, "--checkpoint", kontext, "--image", path, "--output", tmp_path / "out.png")
    assert done.error().startswith(f"error: --image {path}")
    assert len(done.lines) == 1
    assert done.code == 2
    assert not (tmp_path / "out.png").exists()


def test_kontext_without_an_image(main: Callable, kontext: Path) -> None:
    done = main("gen_image", *SMALL, "--checkpoint", kontext)
    assert done.error() == f"error: {kontext} edits an image: give one with --image"
    assert done.code == 2


# flux-fast's experiments.sh: what follows the script's name in each of its commands, and the recipe that it asks for.
_ALL_ON = {
    "dtype": "bfloat16",
    "scheduler_sync_removal": True,
    "fused_qkv": True,
    "channels_last": True,
    "attention": "fa3_fp8",
    "quantization": "float8_per_row",
}
_FLAGS = InductorFlags(
    conv_1x1_as_mm=True,
    epilogue_fusion=False,
    coordinate_descent_tuning=True,
    coordinate_descent_check_all_directions=True,
)
_COMPILED = {"compile_scope": "whole", "max_autotune": True}
EXPERIMENTS = {
    "--disable_bf16 --compile_export_mode disabled --disable_fused_projections --disable_channels_last --disable_fa3 "
    "--disable_quant --disable_inductor_tuning_flags": Recipe(scheduler_sync_removal=True),
    "--compile_export_mode disabled --disable_fused_projections --disable_channels_last --disable_fa3 "
    "--disable_quant --disable_inductor_tuning_flags": Recipe(dtype="bfloat16", scheduler_sync_removal=True),
    "--compile_export_mode compile --disable_fused_projections --disable_channels_last --disable_fa3 --disable_quant "
    "--disable_inductor_tuning_flags": Recipe(
        dtype="bfloat16", scheduler_sync_removal=True, execution="compile", **_COMPILED
    ),
    "--compile_export_mode compile --disable_channels_last --disable_fa3 --disable_quant "
    "--disable_inductor_tuning_flags": Recipe(
        dtype="bfloat16", scheduler_sync_removal=True, execution="compile", fused_qkv=True, **_COMPILED
    ),
    "--compile_export_mode compile --disable_fa3 --disable_quant --disable_inductor_tuning_flags": Recipe(
        **{**_ALL_ON, "attention": "native", "quantization": "none"}, execution="compile", **_COMPILED
    ),
    "--compile_export_mode compile --disable_quant --disable_inductor_tuning_flags": Recipe(
        **{**_ALL_ON, "quantization": "none"}, execution="compile", **_COMPILED
    ),
    "--compile_export_mode compile --disable_inductor_tuning_flags": Recipe(
        **_ALL_ON, execution="compile", **_COMPILED
    ),
    "--compile_export_mode compile": Recipe(**_ALL_ON, execution="compile", inductor_flags=_FLAGS, **_COMPILED),
    "--disable_cache_dit": Recipe(**_ALL_ON, execution="aoti", inductor_flags=_FLAGS, **_COMPILED),
    "--compile_export_mode export_aoti": Recipe(**_ALL_ON, execution="aoti", inductor_flags=_FLAGS, **_COMPILED),
}


@pytest.mark.parametrize("flags", EXPERIMENTS)
@pytest.mark.parametrize("more", ["", " --disable_cache_dit --trace-file trace.json.gz"])
def test_flux_fasts_published_commands(flags: str, more: str) -> None:
    arguments = gen_image.parser().parse_args((flags + more).split())
    assert recipe_from_flags(arguments) == EXPERIMENTS[flags]


def test_flux_fasts_other_flags_are_ours(main: Callable, tmp_path: Path) -> None:
    options = (
        "--ckpt tiny --num_inference_steps 1 --seed 3 --device cpu --use-cached-model --compile_export_mode disabled"
    )
    flags = f"{options} --disable_fa3 --disable_quant --disable_inductor_tuning_flags --height 64 --width 64"
    files = ("--cache-dir", tmp_path / "cache", "--output-file", tmp_path / "a.png", "--trace-file", "t.json.gz")
    done = main("gen_image", *flags.split(), *files, "--prompt", "a red circle")
    assert done.code == 0, done.err
    asked = Recipe(dtype="bfloat16", scheduler_sync_removal=True, fused_qkv=True, channels_last=True)
    assert done.out.splitlines()[0] == f"tiny on cpu, recipe {command_line_name(asked)} (from flux-fast's flags)"
    assert any(line.startswith("warning: --trace-file has no effect here") for line in done.lines)
    assert (tmp_path / "a.png").exists()
    assert recipe_from_flags(gen_image.parser().parse_args(["--seed", "3"])) is None


@pytest.mark.parametrize("name", ["gen_image", "run_benchmark"])
def test_help_shows_flux_fasts_flags_apart(main: Callable, name: str) -> None:
    done = main(name, "--help")
    assert done.code == 0
    ours, _, theirs = done.out.partition("flags of huggingface/flux-fast:")
    flags = (
        "--ckpt --num_inference_steps --output-file --compile_export_mode --disable_bf16 --disable_fused_projections "
        "--disable_channels_last --disable_fa3 --disable_quant --disable_inductor_tuning_flags"
    )
    described = ours.partition("options:")[2]
    for flag in flags.split():
        assert f"\n  {flag}" in theirs
        assert f"\n  {flag}" not in described
    for flag in ["--prompt", "--image", "--cache-dir", "--use-cached-model", "--device", "--seed", "--trace-file"]:
        assert f"\n  {flag}" in described


def test_step_cache_from_the_command_line(main: Callable, tmp_path: Path) -> None:
    recipe = 'bf16,cache={"threshold":0.2}'
    done = main("gen_image", *SMALL, "--recipe", recipe, "--steps", 3, "--output", tmp_path / "a.png")
    assert done.code == 0, done.err
    assert done.out.splitlines()[0] == f"tiny on cpu, recipe {recipe}"
    assert command_line_name(Recipe(dtype="bfloat16", cache=FirstBlockCache(0.2))) == recipe
