"""gen_image.py where a package is missing: refused with both ways on, or built if the user said so."""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from subprocess import run

import pytest
import torch
from PIL import Image

import gen_image
import recipes
from export import order, regions
from export.build_command import build_command
from export.order import Order
from export.runtime import library_of
from export.store import Entry, PackageStore
from recipes import command_line_name, loop_graph, parse
from utils import command_line
from utils.files import ROOT
from utils.request import Request

AOTI = ("--checkpoint", "tiny", "--recipe", "fp32,execution=aoti", "--steps", 1)
MISSING = "draws 64x96, batch 1, 64 text tokens (region vae_decoder)"
EXPORT = "python -m export"
BUILD = f"{EXPORT} build --checkpoint tiny --recipe fp32,execution=aoti --resolutions 64x96 --text-lengths 64"
CACHED, BUILDING = "--use-cached-model", "--build-packages"


@pytest.mark.parametrize(
    ("options", "builds"),
    [
        ("", False),
        ("--recipe aoti", False),
        ("--recipe aoti --build-packages", True),
        ("--recipe aoti --use-cached-model", False),
        ("--use-cached-model", False),
        ("--build-packages", True),
        ("--compile_export_mode export_aoti", True),
        ("--compile_export_mode export_aoti --use-cached-model", False),
        ("--disable_quant", True),
    ],
)
def test_who_may_build(options: str, builds: bool) -> None:
    assert command_line.packages(gen_image.parser().parse_args(options.split())).build is builds


@pytest.mark.parametrize(
    ("options", "way_on"),
    [
        ((), "add --build-packages"),
        ((CACHED,), "run once without --use-cached-model but with --build-packages"),
    ],
)
def test_a_named_recipe_is_refused_with_both_ways_on(
    main: Callable, tmp_path: Path, options: tuple, way_on: str
) -> None:
    cache, output = tmp_path / "cache", tmp_path / "a.png"
    size = ("--height", 64, "--width", 96, "--cache-dir", cache, "--output", output)
    done = main("gen_image", *AOTI, *size, *options)
    refusal = f"error: no package in {cache} {MISSING}: {way_on}, or build one with `{BUILD} --batch 1 --out {cache}`"
    assert done.error() == refusal
    assert done.code == 1
    assert os.listdir(tmp_path) == []


@pytest.mark.slow
def test_one_that_does_not_fit_is_refused_and_not_built_beside(main: Callable, package: Entry, tmp_path: Path) -> None:
    folder = package.path.parent
    before = sorted(os.listdir(folder))
    size = ("--height", 64, "--width", 96, "--cache-dir", folder, "--output", tmp_path / "a.png")
    error = main("gen_image", *AOTI, *size).error()
    assert f"({package.path.name} takes sample float32[1, 16, 8, 8], it comes float32[1, 16, 8, 12])" in error
    assert f": add --build-packages, or build one with `{BUILD} --batch 1 --out {folder}`" in error
    assert sorted(os.listdir(folder)) == before


@pytest.mark.slow
def test_what_only_the_decoder_lacks_is_refused_before_any_step(
    main: Callable, package: Entry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """32x128 makes as many tokens as 64x64."""
    monkeypatch.setattr(Request, "run", lambda request, pipe: pytest.fail("it was drawn"))
    size = ("--height", 32, "--width", 128, "--cache-dir", package.path.parent, "--output", tmp_path / "a.png")
    error = main("gen_image", *AOTI, *size, CACHED).error()
    assert "draws 32x128, batch 1, 64 text tokens (region vae_decoder): run once without --use" in error


HOISTED = "hoisted_embeddings=true,modulation=hoisted"
RECIPES = [
    "fp32,execution=aoti",
    f"fp32,execution=aoti,{HOISTED}",
    f"fp32,execution=aoti,{HOISTED},compile_scope=whole",
]


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(("batch", "loop"), [(1, False), (2, False), (1, True)], ids=["1", "2", "loop"])
def test_every_region_names_all_sizes(
    tiny: Callable, draw: Callable, tmp_path: Path, recipe: str, batch: int, loop: bool
) -> None:
    """Also where the prompt and the position ids are gone by the time that a region is called."""
    pipe = tiny()
    recipes.apply(pipe, parse(recipe), PackageStore(tmp_path))
    library = library_of(pipe)
    if loop:
        loop_graph.OPTIMIZATION.apply(pipe, library.recipe)
    with library.recording() as calls:
        draw(pipe, steps=2, batch=batch, width=96, max_sequence_length=32)
    assert len(calls) == (2 if "whole" in recipe else 5)
    commands = [build_command(library, region.region, inputs) for region, inputs in calls.values()]
    named = command_line_name(library.recipe)
    sizes = f"--resolutions 64x96 --text-lengths 32 --batch {batch}"
    assert commands == [f"{EXPORT} build --checkpoint tiny --recipe {named} {sizes} --out {tmp_path}"] * len(calls)


def test_the_image_that_kontext_edits_has_a_size_of_its_own(main: Callable, kontext: Path, tmp_path: Path) -> None:
    """And what the named command would build is what the refused call was of."""
    image, folder = tmp_path / "in.png", tmp_path / "cache"
    Image.new("RGB", (50, 67)).save(image)
    size = ("--image", image, "--height", 64, "--width", 96, "--steps", 1, "--cache-dir", folder)
    run = ("gen_image", "--checkpoint", kontext, "--recipe", RECIPES[1], "--output", tmp_path / "a.png")
    error = main(*run, *size).error()
    assert "draws 64x96, batch 1, 64 text tokens, an image of 64x48 to edit (region vae_decoder)" in error
    assert "--resolutions 64x96 --text-lengths 64 --batch 1 " in error
    assert f"--out {folder} --image-size 64x48`" in error
    pipe, library = order.pipeline(str(kontext), parse(RECIPES[1]), folder, torch.device("cpu"))
    wanted = Order(str(kontext), parse(RECIPES[1]), ((64, 96),), (1,), (64,), image_size=(64, 48))
    calls = order.called(pipe, library, wanted.requests(), wanted.image_size)
    assert calls[0][1]["hidden_states"].shape == (1, 36, 64)


def test_sizes_of_another_call_are_not_told(tiny: Callable, draw: Callable, tmp_path: Path) -> None:
    pipe = tiny()
    recipes.apply(pipe, parse(RECIPES[1]), PackageStore(tmp_path))
    library = library_of(pipe)
    with library.recording():
        draw(pipe)
    tokens, latents = torch.zeros(1, 24, 64), torch.zeros(1, 16, 8, 12)
    assert "--resolutions HEIGHTxWIDTH --text-lengths TOKENS --batch 1 " in build_command(
        library, regions.BEFORE, {"hidden_states": tokens}
    )
    assert "--resolutions 64x96 --text-lengths TOKENS --batch 1 " in build_command(
        library, regions.DECODER, {"sample": latents}
    )


@pytest.mark.slow
def test_the_command_that_a_refusal_names_builds_what_the_next_run_loads(main: Callable, tmp_path: Path) -> None:
    cache, output = tmp_path / "cache", tmp_path / "a.png"
    size = ("--height", 64, "--width", 96, "--cache-dir", cache, "--output", output)
    run = ("gen_image", "--checkpoint", "tiny", "--recipe", RECIPES[1], "--steps", 1, *size)
    error = main(*run, CACHED).error()
    (command,) = re.findall(r"`(.*)`", error)
    program, *arguments = shlex.split(command.removeprefix(f"{EXPORT} "))
    assert f"{EXPORT} {shlex.join([program, *arguments])}" == command
    built = main("export.__main__", program, *arguments)
    assert built.code == 0, built.err
    done = main(*run, CACHED)
    assert done.code == 0, done.err
    assert "compiling 0.0 s" in done.out
    assert Image.open(output).size == (96, 64)


def test_two_options_that_contradict_each_other(main: Callable, tmp_path: Path) -> None:
    done = main("gen_image", *AOTI, CACHED, BUILDING, "--output", tmp_path / "a.png")
    assert "--use-cached-model builds nothing, and --build-packages what is missing: give one" in done.error()
    assert len(done.lines) == 1, "nothing was loaded"
    assert done.code == 2


@pytest.mark.slow
def test_built_when_told_to_and_found_the_next_time(main: Callable, tmp_path: Path) -> None:
    cache, output = tmp_path / "cache", tmp_path / "a.png"
    size = ("--height", 64, "--width", 64, "--cache-dir", cache, "--output", output)
    done = main("gen_image", *AOTI, *size, BUILDING)
    assert done.code == 0, done.err
    for region in ("before", "vae_decoder"):
        what = f"draws 64x64, batch 1, 64 text tokens (region {region})"
        assert f"no package in {cache} {what}: building one\n" in done.err
    built = sorted(entry.path.name for entry in PackageStore(cache).entries())
    assert [name.partition("-")[0] for name in built] == ["transformer", "vae_decoder"]
    output.unlink()
    done = main("gen_image", *AOTI, *size)
    assert done.code == 0, done.err
    assert "compiling 0.0 s" in done.out
    assert "building" not in done.err
    assert Image.open(output).size == (64, 64)
    assert sorted(entry.path.name for entry in PackageStore(cache).entries()) == built


@pytest.mark.parametrize(
    ("recipe", "options", "builds"),
    [("aoti", [], True), ("", [], True), ("", ["--steps 4"], True), ("", ["--steps 4 --use-cached-model"], False)],
    ids=["recipe", "none", "options", "cached"],
)
def test_make_image_may_build(tmp_path: Path, recipe: str, options: list[str], builds: bool) -> None:
    """Make's own line, up to a program that prints what it is given in place of Python."""
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "python"
    program.write_text(f"#!{sys.executable}\nimport sys\nprint(*sys.argv[1:], sep='\\n')\n")
    program.chmod(0o755)
    for stamp in (".created", ".ready"):
        (tmp_path / stamp).touch()
    given = [f"VENV={tmp_path}", f"RECIPE={recipe}", "PROMPT=a red circle", *(f"ARGS={text}" for text in options)]
    done = run(["make", "--silent", "-C", ROOT, "image", *given], capture_output=True, text=True, check=True)
    lines = [line for line in done.stdout.splitlines() if not line.startswith("make")]
    assert lines[0] == "gen_image.py"
    arguments = gen_image.parser().parse_args(lines[1:])
    assert (arguments.recipe, arguments.prompt) == (recipe or None, "a red circle")
    assert arguments.build_packages is builds
    assert command_line.packages(arguments).build is builds
