"""The checker against rendered scenes, clean and degraded, and against descriptions that are wrong in one claim."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from tiny_flux import checker, scenes
from tiny_flux.scenes import Described, Description, Scene, Thing

ALL_CATEGORIES = (*scenes.CATEGORIES, scenes.EXTRA_CATEGORY)


def rendered(*things: Thing, background: str = "white") -> np.ndarray:
    return checker.to_images(scenes.render([Scene(background, things)]))[0]


def degraded(image: np.ndarray, noise: np.random.Generator) -> np.ndarray:
    """Softer, noisy and tinted: worse than what a VAE does to a flat drawing."""
    soft = ndimage.gaussian_filter(image.astype(np.float64), (1.0, 1.0, 0.0))
    tint = noise.uniform(-8, 8, 3)
    return (soft + tint + noise.normal(0, 6, soft.shape)).round().clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize(("degrade", "count", "wanted"), [(False, 300, 0.99), (True, 200, 0.97)])
def test_truth_is_found_and_alterations_are_rejected(degrade: bool, count: int, wanted: float) -> None:
    rng, noise = random.Random(11), np.random.default_rng(11)
    right = rejected = 0
    for index in range(count):
        description = scenes.sample_description(rng, ALL_CATEGORIES[index % len(ALL_CATEGORIES)])
        altered, _ = checker.alter(description, rng)
        scene = scenes.realize(description, rng)
        image = rendered(*scene.things, background=scene.background)
        found = checker.find_objects(degraded(image, noise) if degrade else image)
        right += checker.judge(found, description).right
        rejected += not checker.judge(found, altered).right
    assert right >= wanted * count
    assert rejected >= wanted * count


def test_objects_are_read_back_with_place_and_radius() -> None:
    drawn = (Thing("triangle", "pink", 60, 180, 46), Thing("star", "cyan", 190, 70, 20))
    found = checker.find_objects(rendered(*drawn, background="beige"))
    assert found.background == "beige"
    assert [(t.shape, t.color) for t in found.things] == [("triangle", "pink"), ("star", "cyan")]
    for thing, truth in zip(found.things, drawn, strict=True):
        assert (thing.x, thing.y, thing.radius) == pytest.approx((truth.x, truth.y, truth.radius), abs=1.5)


@pytest.mark.parametrize("background", scenes.BACKGROUNDS)
def test_blank_image_has_no_objects(background: str) -> None:
    blank = degraded(rendered(background=background), np.random.default_rng(0))
    assert checker.find_objects(blank) == Scene(background, ())


@pytest.mark.parametrize("color", scenes.COLORS)
def test_soft_rims_are_not_objects(color: str) -> None:
    for background in scenes.BACKGROUNDS:
        image = rendered(Thing("cross", color, 128, 128, 48), background=background)
        soft = ndimage.gaussian_filter(image.astype(np.float64), (2.0, 2.0, 0.0)).astype(np.uint8)
        assert [(t.shape, t.color) for t in checker.find_objects(soft).things] == [("cross", color)]


def test_small_blemishes_are_not_objects() -> None:
    image = rendered(Thing("circle", "blue", 90, 90, 44))
    image[200:208, 60:68] = scenes.COLORS["red"]
    image[86:94, 86:94] = scenes.COLORS["yellow"]
    image[:, 230:232] = 0
    assert [(t.shape, t.color) for t in checker.find_objects(image).things] == [("circle", "blue")]


def test_extra_object_makes_nothing_else_false() -> None:
    circle = Thing("circle", "red", 70, 70, 30)
    description = Description("colors", (Described("circle", "red"),))
    assert checker.check(rendered(circle), description).claims == {"1 red circle": True, "nothing else": True}
    other = checker.check(rendered(circle, Thing("star", "blue", 180, 180, 30)), description)
    assert other.claims == {"1 red circle": True, "nothing else": False}
    like = checker.check(rendered(circle, Thing("circle", "red", 180, 180, 30)), description)
    assert like.claims == {"1 red circle": False, "nothing else": False}


@pytest.mark.parametrize("colors", [("red", "blue"), ("blue", "purple"), ("orange", "yellow"), ("cyan", "green")])
def test_touching_objects_of_different_colors_are_split(colors: tuple[str, str]) -> None:
    # A square of radius 30 is 51.6 wide.
    image = rendered(Thing("square", colors[0], 100, 128, 30), Thing("square", colors[1], 151, 128, 30))
    found = checker.find_objects(degraded(image, np.random.default_rng(0)))
    assert sorted((t.shape, t.color) for t in found.things) == sorted(("square", color) for color in colors)


def test_overlapping_like_objects_are_one_unknown_object() -> None:
    found = checker.find_objects(rendered(Thing("circle", "red", 100, 128, 30), Thing("circle", "red", 148, 128, 30)))
    assert [(t.shape, t.color) for t in found.things] == [(checker.UNKNOWN_SHAPE, "red")]
    verdict = checker.judge(found, Description("counting", (Described("circle", "red", count=2),)))
    assert verdict.claims == {"2 red circle": False, "nothing else": False}


def test_pil_images_are_read_and_other_sizes_and_dtypes_refused() -> None:
    image = rendered(Thing("diamond", "green", 128, 128, 30))
    assert checker.find_objects(Image.fromarray(image)) == checker.find_objects(image)
    for wrong in (image[:128], image[..., 0], image / 255, Image.fromarray(image).resize((512, 512))):
        with pytest.raises(ValueError, match=r"256, 256, 3"):
            checker.find_objects(wrong)


def test_every_claim_is_named_and_judged() -> None:
    description = Description(
        "position",
        (Described("circle", "red", size="large", place="top left"), Described("square")),
        relation="left of",
        background="white",
    )
    names = ["1 red circle", "red circle: large", "red circle: top left", "1 square"]
    names += ["first left of second", "background white", "nothing else"]
    square = Thing("square", "pink", 200, 80, 30)

    def failed(*things: Thing, background: str = "white") -> set[str]:
        claims = checker.judge(Scene(background, things), description).claims
        assert list(claims) == names
        return {name for name, holds in claims.items() if not holds}

    circle = Thing("circle", "red", 60, 60, 46)
    assert failed(circle, square) == set()
    assert failed(circle, square, background="gray") == {"background white"}
    assert failed(Thing("circle", "red", 60, 60, 30), square) == {"red circle: large"}
    assert failed(Thing("circle", "red", 128, 60, 46), square) == {"red circle: top left"}
    assert failed(circle, Thing("square", "pink", 60, 200, 30)) == {"first left of second"}
    assert failed(circle) == {"1 square", "first left of second"}


def test_assignment_is_the_kindest_one() -> None:
    # The free circle must leave the only small one to the description that needs it.
    description = Description("two_objects", (Described("circle"), Described("circle", size="small")))
    small, large = Thing("circle", "red", 60, 60, 20), Thing("circle", "blue", 180, 180, 46)
    assert checker.judge(Scene("white", (small, large)), description).right
    assert checker.judge(Scene("white", (large, small)), description).right
    assert not checker.judge(Scene("white", (large, replace(large, x=60, y=60))), description).right


def test_relation_holds_up_to_the_diagonal() -> None:
    description = Description("position", (Described("circle"), Described("star")), relation="above")
    for dx, holds in ((0, True), (79, True), (-79, True), (81, False)):
        things = (Thing("circle", "red", 128 + dx, 80, 20), Thing("star", "red", 128, 160, 20))
        assert checker.judge(Scene("white", things), description).claims["first above second"] is holds


# Free attributes and like objects, where a careless change says the same thing in other words.
DELICATE = [
    Description("two_objects", (Described("circle"), Described("square"))),
    Description("position", (Described("circle"), Described("circle")), relation="left of"),
    Description("two_objects", (Described("circle", size="small"), Described("circle"))),
    Description("two_objects", (Described("circle", place="top left"), Described("circle"))),
    Description("color_attribution", (Described("circle", "red"), Described("square"))),
    Description("color_attribution", (Described("circle", "red"), Described("circle", "blue"))),
    Description(
        "color_attribution", (Described("star", "red", size="small"), Described("cross", "blue", size="large"))
    ),
    Description("several_objects", (Described("circle", "red"), Described("circle", count=2))),
]


def test_no_scene_of_the_original_satisfies_the_altered_description() -> None:
    rng = random.Random(5)
    words = set()
    for index in range(3000):
        category = ALL_CATEGORIES[index % len(ALL_CATEGORIES)]
        description = rng.choice((scenes.sample_description(rng, category), *DELICATE))
        altered, word = checker.alter(description, rng)
        words.add(word)
        assert checker.contradict(description, altered)
        assert checker.contradict(altered, description)
        scene = scenes.realize(description, rng)
        assert checker.judge(scene, description).right
        assert not checker.judge(scene, altered).right, (description, altered)
    assert words == {"color", "shape", "count", "size", "place", "relation", "background", "attribution"}


def test_contradiction_takes_free_attributes_into_account() -> None:
    circle_square, circle_circle, small_circle, *_ = DELICATE
    swapped = Description("two_objects", (Described("square"), Described("circle")))
    assert not checker.contradict(circle_square, swapped)
    assert checker.contradict(circle_square, circle_circle)
    # Of two like circles, one is always both left of and, seen from the other, right of.
    opposite = Description("position", circle_circle.objects, relation="right of")
    assert not checker.contradict(circle_circle, opposite)
    large_circle = Description("two_objects", (Described("circle", size="large"), Described("circle")))
    assert not checker.contradict(small_circle, large_circle)
    one_left = Description("position", (Described("circle"), Described("square")), relation="left of")
    mirrored = Description("position", (Described("square"), Described("circle")), relation="right of")
    assert not checker.contradict(one_left, mirrored)
    assert checker.contradict(one_left, Description("position", one_left.objects, relation="right of"))


def test_an_alteration_changes_one_claim() -> None:
    rng = random.Random(9)
    for _ in range(300):
        description = scenes.sample_description(rng, rng.choice(ALL_CATEGORIES))
        altered, word = checker.alter(description, rng)
        changed = [(a, b) for a, b in zip(description.objects, altered.objects, strict=True) if a != b]
        assert len(changed) == {"attribution": 2, "relation": 0, "background": 0}.get(word, 1)
        assert all(1 <= b.count <= 4 and (a.color is None) == (b.color is None) for a, b in changed)


@pytest.mark.parametrize(
    ("successes", "total", "low", "high"),
    # Newcombe 1998, Statistics in Medicine 17, table I, method 3.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_interval(successes: int, total: int, low: float, high: float) -> None:
    assert checker.wilson(successes, total) == pytest.approx((low, high), abs=5e-5)
    assert checker.wilson(total - successes, total) == pytest.approx((1 - high, 1 - low), abs=5e-5)


def test_command_line_writes_the_figures(tmp_path: Path) -> None:
    output = tmp_path / "checker.json"
    command = [sys.executable, "-m", "tiny_flux.checker", "--scenes", "12", "--output", str(output)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    categories = json.loads(output.read_text())["categories"]
    assert set(categories) == {*scenes.CATEGORIES, "all"}
    assert categories["all"]["truth"]["total"] == 12
    assert categories["counting"]["rejection"]["total"] == 2
    assert "color_attribution" in printed
