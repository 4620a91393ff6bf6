"""benchmark.blocks: whole blocks timed in turns, one that fails leaves the others, and on a GPU for real."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmark import blocks
from recipes import Recipe

CPU = torch.device("cpu")


def test_one_that_fails_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    good, bad = Recipe(dtype="bfloat16"), Recipe(dtype="bfloat16", attention="cudnn")
    prepared = []

    def prepare(recipe: Recipe, *_: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        prepared.append(recipe)
        if recipe == bad:
            raise RuntimeError("no such kernel")
        return {kind: {"relative_error": 0.0} for kind in ("double", "single")}, {"double": "a", "single": "b"}

    def sustained(graphs: dict, calls: int, device: torch.device) -> dict:
        ms = {"double": 2.0, "single": 1.0}
        return {name: {"ms": {"median": ms[name[1]]}, "sm_clock_mhz": 1500.0} for name in graphs}

    monkeypatch.setattr(blocks, "prepare", prepare)
    monkeypatch.setattr(blocks, "sustained", sustained)
    turns = blocks.Turns([good, bad], CPU)
    with pytest.raises(RuntimeError, match="no such kernel"):
        turns.figures(bad)
    row = turns.figures(good)
    assert row["all_blocks_ms"] == 19 * 2 + 38 * 1
    assert (row["double"]["ms"], row["single"]["ms"]) == ({"median": 2.0}, {"median": 1.0})
    assert row["single"]["sm_clock_mhz"] == 1500
    assert prepared == [good, bad], "each once"


def test_what_is_compared_by_itself() -> None:
    compared = blocks.compared()
    assert len(set(compared)) == len(compared)
    assert [recipe.gemm_epilogues for recipe in compared[-3:]] == [False, True, True]
    assert [recipe.int8_adaln for recipe in compared[-2:]] == [False, True]


@pytest.mark.gpu
def test_two_recipes(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    monkeypatch.setattr(blocks, "TEXT", 64)
    monkeypatch.setattr(blocks, "SIDE", 16)
    output = tmp_path / "blocks.json"
    named = ["bf16,fused_qkv=true", "bf16,fused_qkv=true,fused_kernels=true"]
    monkeypatch.setattr(sys, "argv", ["blocks", *named, "--output", str(output)])
    blocks.main()
    rows = json.loads(output.read_text())["blocks"]
    assert [row["fused_kernels"] for row in rows] == [False, True]
    for row in rows:
        assert row["all_blocks_ms"] == pytest.approx(
            19 * row["double"]["ms"]["median"] + 38 * row["single"]["ms"]["median"]
        )
        assert all(row[kind]["relative_error"] < 0.01 for kind in ("double", "single"))
        assert all(100 < row[kind]["sm_clock_mhz"] < 3000 for kind in ("double", "single"))
    assert len(capfd.readouterr().out.splitlines()) == 3
