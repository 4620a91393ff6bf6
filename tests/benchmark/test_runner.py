"""What is kept of a measurement."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from benchmark.job import Job
from benchmark.runner import Runner
from recipes import Recipe, Rung, named
from utils.request import Request


def runner(folder: Path, checkpoint: str = "tiny") -> Runner:
    request = Request("a cat", 512, 256, 1, 0.0, 64)
    return Runner(Job(checkpoint, "cpu", Recipe(), "", None, request, 1, None, True, Path(), Path()), folder)


@pytest.mark.parametrize(("checkpoint", "side"), [("tiny", 256), ("random/flux-dev", 96)])
def test_image_is_kept_small_and_noise_smaller(tmp_path: Path, checkpoint: str, side: int) -> None:
    drawn = tmp_path / "drawn.png"
    Image.new("RGB", (256, 512)).save(drawn)
    result = {"checkpoint": checkpoint, "schema": 1}
    assert runner(tmp_path / "kept", checkpoint)._keep("bf16", result, drawn) is result
    (kept,) = (tmp_path / "kept").glob("*.png")
    with Image.open(kept) as image:
        assert image.size == (side // 2, side)
    assert kept.with_suffix(".json").exists()


def test_report_of_a_loop_graph_has_the_loop_as_its_step(tmp_path: Path) -> None:
    with torch.profiler.profile() as profile, torch.profiler.record_function("denoising_loop"):
        torch.ones(2) + 1
    profile.export_chrome_trace(str(tmp_path / "trace.json"))
    for name in ("loop_graph", "cuda_graph"):
        runner(tmp_path)._keep_report(Rung(name, None, named()[name]), tmp_path / "trace.json")
    loop, steps = (
        next((tmp_path / "traces").glob(f"{name}@*.md")).read_text() for name in ("loop_graph", "cuda_graph")
    )
    assert "| denoising_loop 0 " in loop
    assert "There is no range denoising_step in the trace." in steps


def test_skipped_rung_is_recorded_anew_with_another_recipe(tmp_path: Path) -> None:
    path = tmp_path / "fa3_fp8@512x256-b1-s1.json"
    seen = []
    for recipe in (Recipe(), Recipe(), Recipe(dtype="bfloat16")):
        runner(tmp_path)._keep_skipped(Rung("fa3_fp8", None, recipe, "not here"))
        seen.append((path.stat().st_mtime_ns, path.read_text()))
    assert seen[0] == seen[1]
    assert '"dtype": "float32"' in seen[1][1]
    assert '"dtype": "bfloat16"' in seen[2][1]


def test_skipped_rung_of_before_a_field_came_is_left_alone(tmp_path: Path) -> None:
    rung = Rung("fa3_fp8", None, Recipe(), "not here")
    runner(tmp_path)._keep_skipped(rung)
    path = tmp_path / "fa3_fp8@512x256-b1-s1.json"
    older = json.loads(path.read_text())
    del older["recipe"]["int8_adaln"]
    path.write_text(json.dumps(older))
    runner(tmp_path)._keep_skipped(rung)
    assert json.loads(path.read_text()) == older
    runner(tmp_path)._keep_skipped(replace(rung, skipped="for another reason"))
    assert json.loads(path.read_text())["recipe"]["int8_adaln"] is False
