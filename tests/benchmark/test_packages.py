"""Packages in figures: one real run of all parts, small, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

import recipes
from benchmark import packages
from benchmark.package_parts import sharing_weights
from recipes import Recipe
from utils.files import ROOT

RECIPE = "fp32,execution=compile,compiled_text_encoders=true"
SMALL = ("--height", "64", "--width", "48", "--steps", "3", "--calls", "3")


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, whose processes inherit nothing of this one."""
    whole = [sys.executable, "-m", "benchmark.packages", *map(str, arguments)]
    return subprocess.run(whole, capture_output=True, text=True, cwd=ROOT)


@dataclass(frozen=True)
class Run:
    folder: Path
    output: Path
    out: str
    err: str


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """All parts of tiny in float32."""
    place = tmp_path_factory.mktemp("measured")
    folder, output = place / "packages", place / "packages.json"
    done = command(RECIPE, *SMALL, "--packages", folder, "--output", output, "--commit", "abc123")
    assert done.returncode == 0, done.stderr
    return Run(folder, output, done.stdout, done.stderr)


@pytest.mark.slow
def test_build_start_steps_host_and_error(measured: Run) -> None:
    found = json.loads(measured.output.read_text())
    assert measured.output.with_suffix(".md").read_text() == measured.out
    assert (found["schema"], found["checkpoint"], found["request"]["width"]) == (1, "tiny", 48)
    assert found["recipe"]["name"] == "fp32,execution=aoti"
    assert found["environment"]["commit"] == "abc123"
    assert "benchmark.packages" in found["command"]

    build = found["build"]
    regions = ["before", "double_block", "single_block", "after", "vae_decoder"]
    assert [name.rsplit("-", 1)[0] for name in build["of_models"]] == regions
    assert build["models"] == 5
    assert all(seconds > 0.1 for seconds in build["of_models"].values())
    assert sum(build["of_models"].values()) < build["seconds"]
    assert build["bytes"] == sum(build["files"].values())
    text = found["text_encoders"]
    layers = ["clip_layer", "t5_first_layer", "t5_layer"]
    assert [name.rsplit("-", 1)[0] for name in text["of_models"]] == layers
    assert sum(text["of_models"].values()) < text["seconds"]
    there = {path.name: path.stat().st_size for path in measured.folder.glob("[!.]*")}
    assert {**build["files"], **text["files"]} == there

    start = found["start"]
    assert start["captured"] is False, "there is no CUDA graph on a CPU"
    assert start["bound"] == 3 + blocks() + text_layers()
    assert list(start["first_call_s"]) == ["text_encoders", "transformer", "vae_decoder"]
    assert 0 < start["bind_s"] < build["seconds"] / 2, "it spares the compiler"
    assert start["seconds"] == pytest.approx(start["bind_s"] + sum(start["first_call_s"].values()), abs=0.01)

    steps = found["steps"]
    assert steps["compile_s"] > 1
    of_step = steps["step_ms"]
    for name in ("packages", "compiled"):
        assert 0 < of_step[name]["p10"] <= of_step[name]["median"] <= of_step[name]["p90"]
        assert len(of_step[name]["medians_of_calls"]) == 3
        # Without a device that works on its own, the host takes the step's time and that of the loop around it.
        for host in (steps["host_ms"][name], steps["host_ms"][name]["in_a_row"]):
            assert host["median"] > 0.5 * of_step[name]["median"]
    ratio = of_step["ratio"]
    assert ratio["low"] <= ratio["value"] <= ratio["high"]
    errors = steps["relative_error"]
    assert 0 < errors["step"]["packages"] < 1e-4, "other roundings than eager's, and nothing else"
    assert 0 < errors["step"]["compiled"] < 1e-4
    assert [(error["model"], error["modules"]) for error in errors["models"]] == [
        (name, {"double_block": 2, "single_block": 4}.get(name.rsplit("-", 1)[0], 1)) for name in build["of_models"]
    ]
    assert all(error["value"] <= error["tolerance"] for error in errors["models"])


def blocks() -> int:
    config = json.loads((ROOT / "assets" / "tiny-flux" / "transformer" / "config.json").read_text())
    return config["num_layers"] + config["num_single_layers"]


def text_layers() -> int:
    folder = ROOT / "assets" / "tiny-flux"
    clip, t5 = (json.loads((folder / name / "config.json").read_text()) for name in ("text_encoder", "text_encoder_2"))
    return clip["num_hidden_layers"] + t5["num_layers"]


@pytest.mark.slow
def test_table_and_progress(measured: Run) -> None:
    assert "compiling double_block-" in measured.err
    assert "(2 of 5)" in measured.err
    head, blank, *table = measured.out.splitlines()
    assert head.startswith("fp32,execution=aoti, tiny, 64x48-b1-s3, ")
    assert blank == ""
    assert {line.count("|") for line in table} == {3}
    text = measured.out
    for row in ("| build, s |", "| 5 models, MB |", "| build, text encoders, s |", "| 3 models, MB |"):
        assert row in text
    for row in ("| start, s |", "| step, packages / compiled, 95 % |"):
        assert row in text
    for row in (
        "| host a step, packages, ms |",
        "| host a step, packages, steps in a row, ms |",
        "| relative error of a step, packages |",
    ):
        assert row in text


@pytest.mark.gpu
@pytest.mark.slow
def test_graphs_are_captured_at_the_start(tmp_path: Path) -> None:
    output = tmp_path / "packages.json"
    recipe = "bf16,execution=aoti,cuda_graph=true,scheduler_sync_removal=true,compiled_text_encoders=true"
    done = command(recipe, *SMALL, "--output", output)
    assert done.returncode == 0, done.stderr
    found = json.loads(output.read_text())
    assert found["start"]["captured"] is True
    assert all(found["start"]["first_call_s"][name] > 0 for name in ("text_encoders", "transformer"))
    assert "| start, warm-up and capture of the transformer, s |" in done.stdout
    for name in ("packages", "compiled"):
        for host in (found["steps"]["host_ms"][name], found["steps"]["host_ms"][name]["in_a_row"]):
            assert 0 < host["median"] < 5, "a launch, copies, and Python around them"
        assert 0 <= found["steps"]["relative_error"]["step"][name] < 0.05


@pytest.mark.slow
def test_a_part_that_fails_keeps_the_others(measured: Run, tmp_path: Path) -> None:
    """In a folder where the package is, there is nothing to build; what was measured before stays."""
    before = json.loads(measured.output.read_text())
    output = tmp_path / "again.json"
    output.write_text(measured.output.read_text())
    arguments = (RECIPE, *SMALL, "--packages", measured.folder, "--output", output, "--commit", "abc123")
    done = command(*arguments, "--parts", "build")
    assert done.returncode == 1
    assert "error: not measured: build (" in done.stderr
    assert "was there before it was to be built" in done.stderr
    assert "| build | failed: " in done.stdout
    after = json.loads(output.read_text())
    assert (after["start"], after["steps"]) == (before["start"], before["steps"])
    assert list(after["build"]) == ["failed"]

    done = command(*arguments, "--parts", "start,steps", "--seconds", "0")
    assert "error: not measured: start (no time left); steps (no time left)" in done.stderr
    again = json.loads(output.read_text())
    assert again["build"] == after["build"]
    assert again["steps"] == {"skipped": "no time left of 0 s"}

    other = command("bf16,execution=aoti", *SMALL, "--parts", "start", "--packages", tmp_path, "--output", output)
    assert f"no package in {tmp_path} fits this recipe here: measure the part `build` first" in other.stderr
    assert "build" not in json.loads(output.read_text()), "of another recipe"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("bf16",), "bf16 compiles nothing: give a recipe with execution=compile or aoti"),
        (("compiled", "--steps", "1"), "--steps 1: give at least 2"),
        (("compiled", "--calls", "0"), "--calls 0: give at least 1"),
        (("compiled", "--parts", "build,stop"), "there is no 'stop', but build, text_encoders, start, steps"),
        (("compiled", "--parts", "text_encoders", "--packages", "p"), "for recipes with compiled_text_encoders=true"),
        (("compiled", "--parts", "start"), "give the folder that `build` filled with --packages DIR"),
        (("compiled", "--checkpoint", "random/flux-kontext-dev"), "edits an image"),
        (("compiled,cuda_graph=true",), "cuda_graph=True needs a cuda device"),
        (("compiled", "--output", "no/such/folder.json"), "the folder no/such does not exist"),
    ],
)
def test_bad_usage(
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
    arguments: tuple[str, ...],
    words: str,
) -> None:
    monkeypatch.setattr(sys, "argv", ["packages", "--output", str(tmp_path / "a.json"), "--device", "cpu", *arguments])
    with pytest.raises(SystemExit) as ended:
        packages.main()
    out, err = capfd.readouterr()
    assert (ended.value.code, out) == (2, "")
    assert words in err
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_part_of_a_size_is_left_out() -> None:
    plain = recipes.parse("compiled,cuda_graph=true")
    whole = replace(plain, compiled_text_encoders=True, float8_text_encoder=True, loop_graph=True)
    assert packages.packaged(whole) == replace(plain, execution="aoti")


def test_two_pipelines_over_the_same_weights(tiny: Callable, predict: Callable, error_of: Callable) -> None:
    """What the one's recipe does to its weights is nothing to the other."""
    pipe = tiny(torch.bfloat16)
    expected = predict(pipe)
    other = sharing_weights(pipe)
    ours, theirs = (dict(one.transformer.named_parameters()) for one in (pipe, other))
    assert {name: p.data_ptr() for name, p in ours.items()} == {name: p.data_ptr() for name, p in theirs.items()}
    assert other.text_encoder_2 is pipe.text_encoder_2
    recipes.apply(pipe, Recipe(dtype="bfloat16", fused_qkv=True, quantization="float8_per_row", modulation="hoisted"))
    assert torch.equal(predict(other), expected)
    recipes.apply(other, Recipe(dtype="bfloat16", fused_qkv=True))
    assert error_of(predict(other), expected) < 0.02
    assert error_of(predict(pipe), expected) > error_of(predict(other), expected)


def test_only_the_same_measurement_is_added_to(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    about: dict[str, Any] = {"recipe": {"name": "a"}, "environment": {"commit": "1"}}
    assert packages.earlier(path, about) == {}
    path.write_text("{half a fi")
    assert packages.earlier(path, about) == {}
    path.write_text(json.dumps({**about, "build": {"seconds": 1.0}}))
    assert packages.earlier(path, about)["build"] == {"seconds": 1.0}
    assert packages.earlier(path, {**about, "environment": {"commit": "2"}}) == {}
