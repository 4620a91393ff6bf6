"""Step times of several recipes in one process."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmark import step_times
from export.store import PackageStore

SMALL = ("--height", "64", "--width", "48", "--steps", "3", "--calls", "2")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """run(*arguments): exit code, stdout and stderr of the command in this process."""

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["step_times", *arguments])
        capfd.readouterr()
        try:
            step_times.main()
        except SystemExit as ended:
            return int(ended.code or 0), *capfd.readouterr()
        return 0, *capfd.readouterr()

    return call


def test_every_recipe_is_timed_and_compared(run: Callable, tmp_path: Path) -> None:
    path = tmp_path / "steps.json"
    recipes = ("fp32", "fp32,modulation=hoisted,hoisted_embeddings=true", "bf16", "bf16,cuda_graph=true")
    code, out, err = run(*recipes, *SMALL, "--output", str(path))
    assert code == 1
    assert "error: not measured: bf16,cuda_graph=true" in err
    found = json.loads(path.read_text())
    assert path.with_suffix(".md").read_text() == out
    assert found["checkpoint"] == "tiny"
    assert found["cold_caches"] is False
    assert found["request"]["width"] == 48
    assert found["environment"]["torch"]
    assert " ".join(recipes) in found["command"]
    rows = {row["recipe"]["name"]: row for row in found["recipes"]}
    assert list(rows) == [recipes[0], recipes[1], recipes[2], recipes[3]]
    refused = rows.pop("bf16,cuda_graph=true")
    assert "needs a cuda device" in refused["failed"]
    for row in rows.values():
        step = row["step_ms"]
        assert 0 < step["p10"] <= step["median"] <= step["p90"]
        assert step["first"] > 0
        assert step["mean"] > 0
        assert row["vae_decode_ms"]["median"] > 0
        assert row["compile_s"] == 0
        assert row["peak_memory_bytes"] > 100 * 2**20
    assert rows["fp32"]["relative_error_to_first"] == 0
    assert rows[recipes[1]]["relative_error_to_first"] < 1e-4
    assert 1e-4 < rows["bf16"]["relative_error_to_first"] < 0.2
    lines = out.splitlines()
    assert len(lines) == 2 + 4
    assert lines[2].startswith("| fp32 | ")
    assert len({line.count("|") for line in lines}) == 1
    assert "failed: RecipeError" in lines[-1]


@pytest.mark.gpu
def test_steps_of_a_loop_have_its_share(run: Callable, tmp_path: Path) -> None:
    path, steps = tmp_path / "steps.json", "bf16,scheduler_sync_removal=true,cuda_graph=true"
    code, _, err = run(steps, f"{steps},loop_graph=true", *SMALL, "--calls", "5", "--output", str(path))
    assert code == 0, err
    single, loop = json.loads(path.read_text())["recipes"]
    assert loop["recipe"]["loop_graph"] is True
    assert loop["relative_error_to_first"] == 0
    assert loop["step_ms"]["mean"] == pytest.approx(loop["step_ms"]["first"])
    assert loop["step_ms"]["mean"] < 2.5 * single["step_ms"]["mean"], "the time of a step, and not of three"


@pytest.mark.slow
def test_cold_caches_hold_nothing_of_the_recipe_before(
    run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two recipes with the same blocks: the second one compiles them too. Inductor's counts, as each row is printed."""
    path, counts, line = tmp_path / "steps.json", [], step_times.line
    torch._dynamo.reset()  # what the tests before have compiled, and their counts
    torch._dynamo.utils.counters.clear()

    def counting(*arguments: Any) -> str:
        inductor = torch._dynamo.utils.counters["inductor"]
        counts.append((inductor["fxgraph_cache_miss"], inductor["fxgraph_cache_hit"]))
        return line(*arguments)

    monkeypatch.setattr(step_times, "line", counting)
    recipes = ("fp32,execution=compile", "fp32,execution=compile,hoisted_embeddings=true")
    code, _, _ = run(*recipes, *SMALL, "--steps", "1", "--calls", "1", "--cold", "--output", str(path))
    assert code == 0
    assert json.loads(path.read_text())["cold_caches"] is True
    assert counts == [(3, 0), (6, 0)]  # they add up: two kinds of block and the decoder each, no hit


def test_cold_caches_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    before = dict(os.environ)
    with pytest.raises(RuntimeError), step_times.caches(cold=True) as packages:
        places = [packages.folder, *(Path(os.environ[f"{name}_CACHE_DIR"]) for name in ("TORCHINDUCTOR", "TRITON"))]
        assert all(tmp_path in place.parents for place in places)
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    assert dict(os.environ) == before
    with step_times.caches(cold=False) as packages:
        assert packages == PackageStore()
        assert dict(os.environ) == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("bf16", "--calls", "0"), "--calls 0: give at least 1"),
        (("bf16", "--steps", "0"), "--steps 0: give at least 1"),
        (("fp8",), "unknown recipe 'fp8'"),
        (("bf16", "--checkpoint", "random/flux-kontext-dev"), "edits an image"),
        (("bf16", "--checkpoint", "smol"), "unknown checkpoint 'smol'"),
        (("bf16", "--output", "no/such/folder.json"), "the folder no/such does not exist"),
    ],
)
def test_bad_usage(run: Callable, tmp_path: Path, arguments: tuple[str, ...], words: str) -> None:
    code, out, err = run("--output", str(tmp_path / "a.json"), *arguments)
    assert code == 2
    assert words in err
    assert out == ""
    assert list(tmp_path.iterdir()) == []
