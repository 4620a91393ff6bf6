"""What the embedded model draws: descriptions of scenes, scenes, and their rendering.

A `Description` is what a prompt claims; a `Scene` is one concrete picture in which those claims hold;
`render` turns scenes into images. A description leaves free whatever it doesn't name, so many scenes
realise one description.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace
from typing import Literal

import torch

IMAGE_SIZE = 256  # pixels, both sides

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (214, 39, 40),
    "orange": (250, 140, 20),
    "yellow": (250, 222, 40),
    "green": (40, 160, 60),
    "cyan": (40, 205, 215),
    "blue": (35, 80, 215),
    "purple": (130, 45, 175),
    "pink": (250, 130, 190),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (245, 245, 245),
    "gray": (135, 135, 135),
    "black": (20, 20, 20),
    "beige": (222, 205, 170),
}
SHAPES = ("circle", "square", "triangle", "diamond", "star", "cross")
# Half extents in pixels; the middle one is never named in a prompt.
SIZES: dict[str, tuple[float, float]] = {"small": (18.0, 22.0), "medium": (28.0, 34.0), "large": (43.0, 50.0)}
# Centres of the nine places as fractions of the image's side, (x, y).
PLACES: dict[str, tuple[float, float]] = {
    f"{row} {column}".strip() or "center": (x, y)
    for row, y in (("top", 1 / 6), ("", 1 / 2), ("bottom", 5 / 6))
    for column, x in (("left", 1 / 6), ("", 1 / 2), ("right", 5 / 6))
}
Relation = Literal["left of", "right of", "above", "below"]
RELATIONS: tuple[Relation, ...] = ("left of", "right of", "above", "below")
CATEGORIES = ("single_object", "two_objects", "counting", "colors", "position", "color_attribution")
# Trained on, and of no scored category: up to four kinds of object, the colours of some of them named. They show each
# kind beside every other, also those that the scored categories keep apart (`is_held_out`).
EXTRA_CATEGORY = "several_objects"

_GAP = 10.0  # pixels between two objects, at least
_MARGIN = 4.0  # pixels between an object and the image's edge, at least


@dataclass(frozen=True)
class Described:
    """`count` like objects; an attribute that is None is left free."""

    shape: str
    color: str | None = None
    size: Literal["small", "large"] | None = None
    place: str | None = None
    count: int = 1


@dataclass(frozen=True)
class Description:
    """All that a prompt claims. The scene holds the described objects and no others.

    `relation` says where the first object is, seen from the second.
    """

    category: str
    objects: tuple[Described, ...]
    relation: Relation | None = None
    background: str | None = None


@dataclass(frozen=True)
class Thing:
    """One drawn object; `x`, `y` (its centre) and `radius` (its half extent) in pixels, y downwards."""

    shape: str
    color: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Scene:
    background: str
    things: tuple[Thing, ...]


def combination(description: Description) -> tuple[tuple[int, str, str], ...]:
    """What a description's objects are together: (count, colour or "any", shape) of each, sorted."""
    return tuple(sorted((o.count, o.color or "any", o.shape) for o in description.objects))


def is_held_out(description: Description) -> bool:
    """Whether this combination of objects is kept out of training: a fixed fifth, whatever the counts.

    A single shape without a colour can't be held out: there are only six.
    """
    parts = combination(description)
    if len(parts) == 1 and parts[0][1] == "any":
        return False
    key = "+".join(sorted(f"{color}-{shape}" for _, color, shape in parts))
    return random.Random(f"held out: {key}").random() < 0.2


def sample_description(rng: random.Random, category: str) -> Description:
    """A random description of `category`: one of CATEGORIES or EXTRA_CATEGORY."""
    background = rng.choice(list(BACKGROUNDS)) if rng.random() < 0.5 else None

    def thing(color: float, size: float, place: float = 0.0, count: int = 1) -> Described:
        return Described(
            shape=rng.choice(SHAPES),
            color=rng.choice(list(COLORS)) if rng.random() < color else None,
            size=rng.choice(("small", "large")) if rng.random() < size else None,
            place=rng.choice(list(PLACES)) if rng.random() < place else None,
            count=count,
        )

    relation: Relation | None = None
    if category == "single_object":
        objects = [thing(color=0.0, size=0.3)]
    elif category == "colors":
        objects = [thing(color=1.0, size=0.3)]
    elif category == "counting":
        objects = [thing(color=0.6, size=0.0, count=rng.randint(2, 4))]
    elif category == "two_objects":
        first, second = rng.sample(SHAPES, 2)
        objects = [Described(first), Described(second)]
    elif category == "color_attribution":
        first, second = rng.sample(list(COLORS), 2)
        objects = [
            replace(thing(0.0, 0.15), color=first),
            replace(thing(0.0, 0.15), color=second),
        ]
    elif category == "position":
        if rng.random() < 0.4:
            objects = [thing(color=0.7, size=0.2, place=1.0)]
        else:
            relation = rng.choice(RELATIONS)
            first, second = rng.sample(SHAPES, 2)
            a, b = rng.sample(list(COLORS), 2)
            colored = rng.random() < 0.7
            objects = [
                Described(first, color=a if colored else None),
                Described(second, color=b if colored else None),
            ]
    elif category == EXTRA_CATEGORY:
        count = rng.choice((2, 2, 2, 3, 3, 4))
        kinds = zip(rng.sample(SHAPES, count), rng.sample(list(COLORS), count), strict=True)
        objects = [replace(thing(0.0, 0.1), shape=s, color=c if rng.random() < 0.5 else None) for s, c in kinds]
        if count == 2 and rng.random() < 0.4:
            relation = rng.choice(RELATIONS)
        elif count == 2 and rng.random() < 0.4:
            many = rng.randrange(2)
            objects[many] = replace(objects[many], count=rng.randint(2, 3))
    else:
        raise ValueError(f"unknown category {category!r}")
    return Description(category, tuple(objects), relation, background)


def realize(description: Description, rng: random.Random) -> Scene:
    """A random scene in which every claim of `description` holds and nothing touches anything."""
    while True:
        things = _place_things(description, rng)
        if things is not None:
            background = description.background or rng.choice(list(BACKGROUNDS))
            return Scene(background, things)


def _place_things(description: Description, rng: random.Random) -> tuple[Thing, ...] | None:
    """Try once; None when an object found no room or the relation does not hold."""
    total = sum(o.count for o in description.objects)
    sizes = ("medium", "large") if total <= 2 else ("medium",)  # of what is just "a star"
    things: list[Thing] = []
    for described in description.objects:
        # Like objects share colour and size, as "three red circles" suggests.
        color = described.color or rng.choice(list(COLORS))
        size: str = described.size or rng.choice(sizes)
        for _ in range(described.count):
            radius = rng.uniform(*SIZES[size])
            for _ in range(20):
                x, y = _position(described.place, radius, rng)
                if all(math.hypot(t.x - x, t.y - y) > 1.25 * (t.radius + radius) + _GAP for t in things):
                    things.append(Thing(described.shape, color, x, y, radius))
                    break
            else:
                return None
    if description.relation is not None and relation_of(things[0], things[1]) != description.relation:
        return None
    return tuple(things)


def _position(place: str | None, radius: float, rng: random.Random) -> tuple[float, float]:
    low, high = radius + _MARGIN, IMAGE_SIZE - radius - _MARGIN
    if place is None:
        return rng.uniform(low, high), rng.uniform(low, high)
    x, y = (IMAGE_SIZE * fraction + rng.uniform(-16, 16) for fraction in PLACES[place])
    return min(max(x, low), high), min(max(y, low), high)


def relation_of(first: Thing, second: Thing) -> Relation | None:
    """Where `first` is, seen from `second`; None where it is too close to a diagonal to say (within 15 degrees)."""
    dx, dy = first.x - second.x, first.y - second.y
    angle = math.degrees(math.atan2(abs(dy), abs(dx)))
    if angle < 30:
        return "left of" if dx < 0 else "right of"
    if angle > 60:
        return "above" if dy < 0 else "below"
    return None


def place_of(x: float, y: float) -> str:
    """The nearest of the nine places."""

    def distance(name: str) -> float:
        column, row = PLACES[name]
        return math.hypot(IMAGE_SIZE * column - x, IMAGE_SIZE * row - y)

    return min(PLACES, key=distance)


def render(scenes: list[Scene], device: torch.device | str = "cpu") -> torch.Tensor:
    """Draw scenes with anti-aliased edges: float32 [len(scenes), 3, 256, 256] in [0, 1]."""
    most = max((len(s.things) for s in scenes), default=0)
    background = torch.tensor([BACKGROUNDS[s.background] for s in scenes], dtype=torch.float32)
    geometry = torch.zeros(len(scenes), most, 3)
    shape = torch.zeros(len(scenes), most, dtype=torch.long)
    color = torch.zeros(len(scenes), most, 3)
    for i, scene in enumerate(scenes):
        for j, t in enumerate(scene.things):
            geometry[i, j] = torch.tensor((t.x, t.y, t.radius))
            shape[i, j] = SHAPES.index(t.shape)
            color[i, j] = torch.tensor(COLORS[t.color], dtype=torch.float32)
    return draw(background.to(device), geometry.to(device), shape.to(device), color.to(device))


def draw(background: torch.Tensor, geometry: torch.Tensor, shape: torch.Tensor, color: torch.Tensor) -> torch.Tensor:
    """The tensor form of `render`, n scenes of at most k objects; an object of radius 0 is absent.

    background [n, 3] and color [n, k, 3] in 0..255; geometry [n, k, 3] as (x, y, radius) in pixels;
    shape [n, k] int64 indices into SHAPES. Returns float32 [n, 3, 256, 256] in [0, 1].
    """
    grid = torch.arange(IMAGE_SIZE, device=background.device) + 0.5
    image = background[:, :, None, None].expand(-1, -1, IMAGE_SIZE, IMAGE_SIZE)
    for j in range(geometry.shape[1]):
        x, y, radius = (v[:, None, None] for v in geometry[:, j].unbind(-1))
        px, py = grid[None, None, :] - x, grid[None, :, None] - y
        signed = _signed_distance(px, py, radius.clamp(min=1e-3))
        index = shape[:, j, None, None, None].expand(-1, 1, IMAGE_SIZE, IMAGE_SIZE)
        cover = (0.5 - signed.gather(1, index)).clamp(0, 1) * (radius > 0)[:, None]
        image = image + cover * (color[:, j, :, None, None] - image)
    return image / 255


def _signed_distance(px: torch.Tensor, py: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
    """Signed distance of each pixel to the outline of each shape, [n, len(SHAPES), height, width], inside negative.

    Half-plane forms: exact at the edges, an underestimate beyond corners. The pentagram follows the usual
    folding into one tenth of the plane.
    """
    ax, ay = px.abs(), py.abs()
    circle = torch.hypot(px, py) - r
    square = torch.maximum(ax, ay) - 0.86 * r
    triangle = torch.maximum(0.894427 * ax - 0.447214 * (py + 1.0 * r), py - 0.8 * r)
    diamond = (ax + ay - 1.1 * r) * math.sqrt(0.5)
    cross = torch.minimum(torch.maximum(ax - r, ay - 0.34 * r), torch.maximum(ay - r, ax - 0.34 * r))
    # Five-pointed star: fold the angle around "up" into [0, 36 degrees], then one edge's half plane.
    angle = torch.atan2(ax.expand_as(circle), -py.expand_as(circle))
    tenth = math.pi / 5
    folded = (torch.remainder(angle + tenth, 2 * tenth) - tenth).abs()
    distance = torch.hypot(px, py)
    fx, fy = distance * torch.sin(folded), distance * torch.cos(folded)
    outer, inner = 1.08 * r, 0.46 * r
    ix, iy = inner * math.sin(tenth), inner * math.cos(tenth)
    length = torch.hypot(ix, outer - iy)
    star = ((outer - iy) * fx + ix * (fy - outer)) / length
    return torch.stack([v.expand_as(circle) for v in (circle, square, triangle, diamond, star, cross)], dim=1)
