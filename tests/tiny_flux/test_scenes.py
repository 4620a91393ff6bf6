"""Descriptions, the scenes that realise them, and how they are drawn."""

from __future__ import annotations

import itertools
import math
import random
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from tiny_flux import checker, scenes
from tiny_flux.scenes import Described, Description, Scene, Thing
from utils.files import ROOT

ALL_CATEGORIES = (*scenes.CATEGORIES, scenes.EXTRA_CATEGORY)


def pixel(image: torch.Tensor, x: int, y: int) -> tuple[int, int, int]:
    """The colour in 0..255 of an image [3, height, width]."""
    r, g, b = (image[:, y, x] * 255).round().int().tolist()
    return r, g, b


def covered(image: torch.Tensor) -> float:
    """Pixels that a black object covers on white [245], parts of them counted as parts."""
    return float((1 - (image[0] * 255 - 20) / 225).sum())


def black(shape: str, radius: float, x: float = 128.0, y: float = 128.0) -> torch.Tensor:
    """One object in the black of BACKGROUNDS on white: [3, 256, 256]."""
    white, ink = (torch.tensor([scenes.BACKGROUNDS[name]], dtype=torch.float32) for name in ("white", "black"))
    geometry = torch.tensor([[[x, y, radius]]])
    return scenes.draw(white, geometry, torch.tensor([[scenes.SHAPES.index(shape)]]), ink[:, None])[0]


@pytest.mark.parametrize("category", ALL_CATEGORIES)
def test_a_scene_bears_out_its_description_and_nothing_touches(category: str) -> None:
    rng = random.Random(f"scenes of {category}")
    for _ in range(400):
        description = scenes.sample_description(rng, category)
        assert description.category == category
        scene = scenes.realize(description, rng)
        assert checker.judge(scene, description).right, (description, scene)
        assert len(scene.things) == sum(o.count for o in description.objects) <= 4
        for a, b in itertools.combinations(scene.things, 2):
            # 1.25 radii reach beyond every shape's farthest corner, a square's at 0.86 * sqrt(2).
            assert math.hypot(a.x - b.x, a.y - b.y) > 1.25 * (a.radius + b.radius) + 10
        for thing in scene.things:
            assert thing.radius + 4 <= thing.x <= scenes.IMAGE_SIZE - thing.radius - 4
            assert thing.radius + 4 <= thing.y <= scenes.IMAGE_SIZE - thing.radius - 4


def test_descriptions_claim_what_their_category_is_about() -> None:
    rng = random.Random(1)
    for category, _ in itertools.product(scenes.CATEGORIES, range(200)):
        objects = (description := scenes.sample_description(rng, category)).objects
        claims = {
            "single_object": len(objects) == 1 and objects[0].color is None,
            "colors": len(objects) == 1 and objects[0].color is not None,
            "counting": len(objects) == 1 and 2 <= objects[0].count <= 4,
            "two_objects": len(objects) == 2 and objects[0].shape != objects[1].shape,
            "color_attribution": len(objects) == 2 and None not in (objects[0].color, objects[1].color),
            "position": (description.relation is None) != (objects[0].place is None),
        }
        assert claims[category], description
        assert objects[0].count > 1 or category != "counting"
        assert (objects[0].place or description.relation) is None or category == "position"


def test_unknown_category_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown category 'colour'"):
        scenes.sample_description(random.Random(0), "colour")


def test_objects_and_backgrounds_have_their_colors() -> None:
    for background, color in itertools.product(scenes.BACKGROUNDS, scenes.COLORS):
        image = scenes.render([Scene(background, (Thing("circle", color, 100, 150, 30),))])[0]
        assert pixel(image, 100, 150) == scenes.COLORS[color]
        assert pixel(image, 5, 5) == scenes.BACKGROUNDS[background]


# Areas in squared radii, by elementary geometry from each shape's outline.
AREAS = {
    "circle": math.pi,
    "square": (2 * 0.86) ** 2,
    "triangle": 1.8 * 1.8 / 2,  # height 1.8, base as wide: its sides rise 2 for each 1
    "diamond": 2 * 1.1**2,
    "star": 10 * 1.08 * 0.46 * math.sin(math.pi / 5) / 2,
    "cross": 2 * (2 * 2 * 0.34) - (2 * 0.34) ** 2,
}


@pytest.mark.parametrize("shape", scenes.SHAPES)
@pytest.mark.parametrize("radius", [20.0, 48.0])
def test_area_is_the_shapes(shape: str, radius: float) -> None:
    assert covered(black(shape, radius)) == pytest.approx(AREAS[shape] * radius**2, rel=0.01)


@pytest.mark.parametrize("shape", scenes.SHAPES)
def test_edges_are_anti_aliased(shape: str) -> None:
    image = black(shape, 40.3, x=100.2, y=120.4)[0] * 255
    assert ((image > 22) & (image < 243)).sum() > 4 * 40, "pixels of the outline are covered in part"
    # A third of a pixel more of radius shows, which whole pixels can't.
    wider = covered(black(shape, 40.6, x=100.2, y=120.4)) - covered(black(shape, 40.3, x=100.2, y=120.4))
    assert wider == pytest.approx(AREAS[shape] * (40.6**2 - 40.3**2), rel=0.15)


@pytest.mark.parametrize("shape", scenes.SHAPES)
def test_an_object_lies_where_it_should_and_points_up(shape: str) -> None:
    image = 1 - (black(shape, 40, x=90, y=170)[0] * 255 - 20) / 225
    columns = torch.arange(scenes.IMAGE_SIZE) + 0.5
    assert float((image.sum(0) * columns).sum() / image.sum()) == pytest.approx(90, abs=0.3)
    occupied = image.sum(1) > 0.5
    top, bottom = (float(columns[occupied][i]) for i in (0, -1))
    above, below = {"triangle": (40, 32), "star": (43.2, 35), "square": (34.4, 34.4), "diamond": (44, 44)}.get(
        shape, (40, 40)
    )
    assert (170 - top, bottom - 170) == pytest.approx((above, below), abs=2)


def test_rendering_is_deterministic_and_does_not_depend_on_the_batch() -> None:
    rng = random.Random(4)
    batch = [scenes.realize(scenes.sample_description(rng, category), rng) for category in ALL_CATEGORIES]
    together = scenes.render(batch)
    assert together.shape == (len(batch), 3, 256, 256)
    assert together.dtype == torch.float32
    assert together.min() >= 0
    assert together.max() <= 1
    assert torch.equal(scenes.render(batch), together)
    for scene, image in zip(batch, together, strict=True):
        assert torch.equal(scenes.render([scene])[0], image)


def test_radius_0_is_no_object() -> None:
    white, red = torch.tensor([[245.0, 245.0, 245.0]]), torch.tensor([[[214.0, 39.0, 40.0]]])
    for index in range(len(scenes.SHAPES)):
        for place in ((0.0, 0.0), (128.0, 128.0), (100.5, 100.5)):
            geometry = torch.tensor([[[*place, 0.0]]])
            image = scenes.draw(white, geometry, torch.tensor([[index]]), red)
            assert torch.equal(image, (white / 255)[:, :, None, None].expand_as(image))


def test_a_scene_may_be_empty() -> None:
    assert pixel(scenes.render([Scene("beige", ())])[0], 128, 128) == scenes.BACKGROUNDS["beige"]


def every_pair() -> list[Description]:
    kinds = [Described(shape, color) for shape, color in itertools.product(scenes.SHAPES, scenes.COLORS)]
    return [Description("color_attribution", pair) for pair in itertools.combinations(kinds, 2)]


def test_about_a_fifth_of_the_combinations_is_held_out() -> None:
    pairs = every_pair()
    assert 0.18 < sum(map(scenes.is_held_out, pairs)) / len(pairs) < 0.22


def test_whether_a_combination_is_held_out_depends_on_its_objects_alone() -> None:
    rng = random.Random(2)
    for description in rng.sample(every_pair(), 200):
        a, b = description.objects
        held_out = scenes.is_held_out(description)
        others = [
            replace(description, objects=(b, a)),
            replace(description, category="position", relation="above"),
            replace(description, background="gray"),
            replace(description, objects=(replace(a, size="small", place="top"), b)),
        ]
        assert all(scenes.is_held_out(other) == held_out for other in others)


def test_a_kind_of_object_is_held_out_in_every_count() -> None:
    for shape, color in itertools.product(scenes.SHAPES, scenes.COLORS):
        counts = (Description("counting", (Described(shape, color, count=count),)) for count in (1, 2, 3, 4))
        assert len(set(map(scenes.is_held_out, counts))) == 1


def test_a_lone_uncolored_shape_is_never_held_out() -> None:
    for shape, count in itertools.product(scenes.SHAPES, (1, 2, 3, 4)):
        assert not scenes.is_held_out(Description("counting", (Described(shape, count=count),)))


def test_what_is_held_out_is_the_same_in_every_process() -> None:
    program = (
        "import random; from tiny_flux import scenes; rng = random.Random(8)\n"
        "some = [scenes.sample_description(rng, c) for c in scenes.CATEGORIES * 50]\n"
        "print(''.join(str(int(scenes.is_held_out(d))) for d in some))"
    )
    rng = random.Random(8)
    here = "".join(str(int(scenes.is_held_out(scenes.sample_description(rng, c)))) for c in scenes.CATEGORIES * 50)
    assert 30 < here.count("1") < 75
    for salt in ("1", "2"):  # sets and dicts of strings must not matter
        command = [sys.executable, "-c", program]
        ended = subprocess.run(command, cwd=ROOT, env={"PYTHONHASHSEED": salt}, capture_output=True, text=True)
        assert ended.stdout.strip() == here, ended.stderr


def test_places_and_relations_are_read_as_they_are_drawn() -> None:
    for name, (x, y) in scenes.PLACES.items():
        assert scenes.place_of(256 * x + 16, 256 * y - 16) == name
    centre = Thing("circle", "red", 128, 128, 20)
    for (dx, dy), relation in {
        (-50, 10): "left of",
        (50, -10): "right of",
        (10, -50): "above",
        (-10, 50): "below",
        (40, 40): None,
    }.items():
        assert scenes.relation_of(Thing("star", "blue", 128 + dx, 128 + dy, 20), centre) == relation
