"""The held-out prompts and how images of them are scored."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from tiny_flux import checker, scenes
from tiny_flux.captions import caption
from tiny_flux.data import training_description
from tiny_flux.scenes import CATEGORIES
from tiny_flux.score import PROMPTS, SEED, Prompt, held_out_prompts, save_grid, score


@pytest.fixture(scope="module")
def prompts() -> list[Prompt]:
    return held_out_prompts()


@pytest.fixture(scope="module")
def truth(prompts: list[Prompt]) -> list[Image.Image]:
    """A drawing of what each prompt says."""
    rng = random.Random(0)
    drawn = (scenes.render([scenes.realize(prompt.description, rng)]) for prompt in prompts)
    return [Image.fromarray(checker.to_images(image)[0]) for image in drawn]


def test_500_prompts_fixed_by_the_seed(prompts: list[Prompt]) -> None:
    assert len(prompts) == PROMPTS == 500
    assert len({prompt.text for prompt in prompts}) == 500
    random.seed(1)
    assert held_out_prompts() == prompts
    assert held_out_prompts(100) == prompts[:100]
    assert held_out_prompts(seed=SEED + 1) != prompts
    categories = Counter(prompt.description.category for prompt in prompts)
    assert set(categories) == set(CATEGORIES)
    assert set(categories.values()) <= {83, 84}


def test_at_least_half_have_a_held_out_combination(prompts: list[Prompt]) -> None:
    held_out = [scenes.is_held_out(prompt.description) for prompt in prompts]
    assert sum(held_out) >= 250
    assert not all(held_out)


def test_no_prompt_is_a_training_caption(prompts: list[Prompt]) -> None:
    # That no wording is, test_captions proves; here are the sentences themselves, whatever their case and full stop.
    texts = {prompt.text.lower().rstrip(".") for prompt in prompts}
    rng = random.Random(0)
    captions = (caption(training_description(rng), rng).lower().rstrip(".") for _ in range(20_000))
    assert texts.isdisjoint(captions)


def test_rendered_truth_scores_all(prompts: list[Prompt], truth: list[Image.Image]) -> None:
    scored = score(prompts, truth)
    assert scored["wrong"] == []
    assert list(scored["categories"]) == [*CATEGORIES, "all"]
    for figures in scored["categories"].values():
        assert figures["accuracy"] == 1
        assert figures["right"] == figures["of"] >= 83
        assert figures["high"] == pytest.approx(1)
        assert 0.95 < figures["low"] < 1
    assert scored["categories"]["all"]["of"] == 500


def test_images_of_other_prompts_score_low(prompts: list[Prompt], truth: list[Image.Image]) -> None:
    # The categories take turns, so an image is shown for a prompt of its own category: harder to reject.
    moved = truth[len(CATEGORIES) :] + truth[: len(CATEGORIES)]
    scored = score(prompts, moved)
    assert scored["categories"]["all"]["accuracy"] < 0.06
    assert scored["categories"]["single_object"]["accuracy"] < 0.25  # one in six shapes, two backgrounds in five
    assert len(scored["wrong"]) == 500 - scored["categories"]["all"]["right"]
    assert all(wrong["failed"] for wrong in scored["wrong"])


def test_counts_and_intervals_are_of_the_images_given(prompts: list[Prompt], truth: list[Image.Image]) -> None:
    blank = Image.new("RGB", (256, 256), scenes.BACKGROUNDS["white"])
    images = [blank if i % 12 == 0 else image for i, image in enumerate(truth[:120])]
    scored = score(prompts[:120], images)
    single, every = scored["categories"]["single_object"], scored["categories"]["all"]
    assert (single["right"], single["of"], every["right"], every["of"]) == (10, 20, 110, 120)
    assert (single["low"], single["high"]) == pytest.approx((0.2993, 0.7007), abs=1e-4)  # by hand, z = 1.96
    assert (every["low"], every["high"]) == checker.wilson(110, 120)
    assert [wrong["prompt"] for wrong in scored["wrong"]] == [prompt.text for prompt in prompts[:120:12]]


def test_the_grid_is_written_whole(prompts: list[Prompt], truth: list[Image.Image], tmp_path: Path) -> None:
    save_grid(prompts[:16], truth[:16], tmp_path / "grid.png")
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.size == (1000, 1100)
        assert len(grid.convert("RGB").getcolors(2**24)) > 100
    assert [path.name for path in tmp_path.iterdir()] == ["grid.png"]
