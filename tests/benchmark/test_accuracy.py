"""Recipes scored on the embedded model's prompts, against bf16."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from diffusers import DiffusionPipeline

from benchmark.accuracy import noise_seeds
from tiny_flux.scenes import CATEGORIES
from tiny_flux.score import PROMPTS, SEED, draw, held_out_prompts
from utils.image_metrics import difference


def test_a_prompts_noise_is_its_own() -> None:
    seeds = noise_seeds(PROMPTS, 4, SEED)
    assert len(set(seeds)) == 2000
    assert seeds[:PROMPTS] == list(range(SEED, SEED + PROMPTS))  # as in results/tiny-flux/scores.json
    fewer = noise_seeds(10, 2, SEED)
    assert fewer == seeds[:10] + seeds[PROMPTS : PROMPTS + 10]


def test_the_batch_changes_rounding_only(tiny: Callable[..., DiffusionPipeline]) -> None:
    prompts, pipe = held_out_prompts(5)[2:], tiny()  # the first two come out empty in 4 steps, whatever the noise
    alone, together = (list(draw(pipe, prompts, [7, 8, 9], steps=4, batch=batch)) for batch in (1, 2))
    for one, other in zip(alone, together, strict=True):
        assert difference(one, other)["max_abs"] <= 2
    other_noise = next(draw(pipe, prompts[:1], [8], steps=4, batch=1))
    assert difference(alone[0], other_noise)["max_abs"] > 20


@pytest.mark.slow
def test_recipes_are_paired_with_bf16(main: Callable, tmp_path: Path) -> None:
    """One that draws the same, one that ruins the images (all blocks but the first skipped) and one that can't run."""
    path = tmp_path / "accuracy.json"
    same, ruined, refused = "bf16, modulation=hoisted", 'bf16,cache={"threshold":100.0}', "bf16,cuda_graph=true"
    size = ("--prompts", 12, "--seeds", 2, "--steps", 6, "--batch", 5)
    ended = main("benchmark.accuracy", same, ruined, "bf16", refused, *size, "--output", path, "--commit", "abc")
    assert ended.code == 1
    assert ended.error() == f"error: not measured: {refused}"
    found = json.loads(path.read_text())
    assert (found["prompts"], found["seeds"], found["seed"], found["batch"]) == (12, 2, SEED, 5)
    assert found["environment"]["commit"] == "abc"
    assert found["command"].startswith("python ")
    assert path.with_suffix(".md").read_text() == ended.out
    rows = {row["recipe"]["name"]: row for row in found["accuracy"]}
    assert list(rows) == ["bf16", same, ruined, refused]
    assert "needs a cuda device" in rows.pop(refused)["failed"]
    for row in rows.values():
        assert set(row["categories"]) == {*CATEGORIES, "all"}
        every = row["categories"]["all"]
        assert sum("".join(row["right"]).count(x) for x in "01") == every["of"] == 24
        assert "".join(row["right"]).count("1") == every["right"]
        assert every["accuracy"]["value"] == every["right"] / 24
    assert "difference_points" not in rows["bf16"]["categories"]["all"]
    assert "image_difference" not in rows["bf16"]

    right = {name: np.array([list(map(int, x)) for x in row["right"]]) for name, row in rows.items()}
    assert right["bf16"].sum() >= 4  # so that there is something to lose
    assert rows[same]["right"] == rows["bf16"]["right"]
    assert rows[same]["image_difference"]["equal"] == 24
    assert rows[same]["above_limit"] is True
    lost = rows[ruined]["categories"]["all"]
    assert lost["difference_points"]["value"] == pytest.approx(100 * (right[ruined] - right["bf16"]).mean())
    assert lost["difference_points"]["low"] < -10
    assert sum(rows[ruined]["lost_by_place"]) == lost["lost"]
    assert len(rows[ruined]["lost_by_place"]) == 5
    assert rows[ruined]["above_limit"] is False
    assert rows[ruined]["image_difference"]["psnr_db"]["median"] < 30
    assert rows[ruined]["image_difference"]["ssim"]["median"] < 0.99
    lines = ended.out.splitlines()
    assert len(lines) == 2 + 4
    assert "| yes |" in lines[3]
    assert "| no |" in lines[4]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--prompts", 0), "--prompts 0: give at least 1"),
        (("--seeds", 0), "--seeds 0: give at least 1"),
        (("--batch", 0), "--batch 0: give at least 1"),
        (("fp8",), "unknown recipe 'fp8'"),
        (("--checkpoint", "random/flux-dev"), "the checker knows the embedded model's scenes only"),
        (("--checkpoint", "random/flux-kontext-dev"), "edits an image"),
        (("--output", "no/such/folder.json"), "the folder no/such does not exist"),
        (
            ("--output", "table.md"),
            "--output table.md: give a name that ends in .json; a table of it is written beside",
        ),
    ],
)
def test_bad_usage(main: Callable, tmp_path: Path, arguments: tuple, words: str) -> None:
    ended = main("benchmark.accuracy", "--output", tmp_path / "a.json", *arguments)
    assert ended.code == 2
    assert words in ended.error()
    assert list(tmp_path.iterdir()) == []
