"""What is said of paired samples."""

from __future__ import annotations

import math

import numpy as np
import pytest
from PIL import Image

from benchmark.paired import accuracies, bootstrap_mean, by_place, image_differences
from utils.image_metrics import difference


def test_the_interval_of_a_mean_is_near_the_normal_one() -> None:
    values = np.random.default_rng(1).normal(3.0, 2.0, size=500)
    half = 1.96 * values.std(ddof=1) / math.sqrt(500)
    found = bootstrap_mean(values)
    assert found["value"] == pytest.approx(values.mean())
    assert found["low"] == pytest.approx(values.mean() - half, abs=0.05 * half)
    assert found["high"] == pytest.approx(values.mean() + half, abs=0.05 * half)
    assert bootstrap_mean(values) == found
    assert bootstrap_mean([2.0, 2.0]) == {"value": 2.0, "low": 2.0, "high": 2.0}


def test_accuracies_by_hand() -> None:
    categories = ["a", "b", "a", "b"]
    reference = np.array([[1, 1], [1, 0], [0, 0], [1, 1]], dtype=bool)
    right = np.array([[1, 0], [1, 1], [0, 0], [0, 0]], dtype=bool)
    table = accuracies(right, reference, categories)
    assert list(table) == ["a", "b", "all"]
    assert {name: (row["right"], row["of"]) for name, row in table.items()} == {"a": (1, 4), "b": (2, 4), "all": (3, 8)}
    assert {name: (row["gained"], row["lost"]) for name, row in table.items()} == {
        "a": (0, 1),
        "b": (1, 2),
        "all": (1, 3),
    }
    assert table["all"]["accuracy"]["value"] == 0.375
    assert table["all"]["difference_points"]["value"] == -25
    assert table["a"]["difference_points"] == {"value": -25, "low": -50, "high": 0}  # prompts: -50 and 0
    assert "difference_points" not in accuracies(right, None, categories)["all"]


def test_places_in_a_batch() -> None:
    """Three prompts, two images each, in batches of four: places 0, 1, 2 and then 3, 0, 1."""
    images = np.array([[1, 1], [0, 1], [0, 0]], dtype=bool)
    assert by_place(images, 4, parts=2) == [2, 1]
    assert by_place(images, 4, parts=4) == [2, 0, 0, 1]
    assert by_place(~images, 4, parts=4) == [0, 2, 1, 0]
    assert by_place(images, 1) == [3, 0, 0, 0, 0]


def test_images_of_one_prompt_count_as_one() -> None:
    """Four times the same verdict tells no more than one; four independent ones do."""
    random = np.random.default_rng(0)
    reference, right = random.random((2, 200, 1)) < 0.8
    once = accuracies(right, reference, ["a"] * 200)["all"]["difference_points"]
    repeated = accuracies(right.repeat(4, axis=1), reference.repeat(4, axis=1), ["a"] * 200)["all"]["difference_points"]
    assert repeated == once
    reference, right = random.random((2, 200, 4)) < 0.8
    independent = accuracies(right, reference, ["a"] * 200)["all"]["difference_points"]
    width = (independent["high"] - independent["low"]) / (once["high"] - once["low"])
    assert width == pytest.approx(0.5, abs=0.1)


def test_pairing_narrows_the_interval() -> None:
    """Both fail at the same prompts but one: a difference of -1 in 100, where either is known to 10 in 100 only."""
    reference = (np.random.default_rng(0).random((100, 1)) < 0.5).repeat(4, axis=1)
    right = reference.copy()
    right[np.flatnonzero(reference[:, 0])[0]] = False
    row = accuracies(right, reference, ["a"] * 100)["all"]
    assert row["difference_points"]["value"] == pytest.approx(-1)
    assert -4 < row["difference_points"]["low"] < -2
    assert row["difference_points"]["high"] == 0
    assert row["accuracy"]["high"] - row["accuracy"]["low"] > 0.15


def test_image_differences_with_equal_ones_among_them() -> None:
    plain = Image.fromarray(np.full((16, 16, 3), 100, np.uint8))
    others = [Image.fromarray(np.full((16, 16, 3), 100 + d, np.uint8)) for d in (0, 0, 0, 10, 20)]
    found = image_differences([difference(other, plain) for other in others])
    assert found["equal"] == 3
    assert found["psnr_db"] == {"median": None, "p10": pytest.approx(20 * math.log10(255 / 20), abs=0.01)}
    assert found["ssim"]["median"] == 1
    assert found["ssim"]["p10"] < 1
    assert image_differences([difference(plain, plain)])["psnr_db"] == {"median": None, "p10": None}
