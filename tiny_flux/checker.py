"""Whether an image shows what a description claims, decided without a learned model.

`find_objects` reads a scene back from an image: background, foreground by colour distance, connected
components, a colour and a best-fitting shape for each. `check` compares that scene with a description claim by
claim. `alter` makes a description that is wrong in exactly one claim, so that the checker itself can be measured:

    python -m tiny_flux.checker --scenes 2000 --seed 0 --output results/checker.json
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from scipy import ndimage
from tqdm import tqdm

from tiny_flux import scenes
from tiny_flux.scenes import Described, Description, Scene, Thing
from utils.errors import run_command

UNKNOWN_SHAPE = "unknown"

_PALETTE = scenes.BACKGROUNDS | scenes.COLORS
_OPPOSITE: dict[scenes.Relation, scenes.Relation] = {
    "left of": "right of",
    "right of": "left of",
    "above": "below",
    "below": "above",
}

# Distances are CIE76 (Euclidean in CIELAB). An object's colour is at least 44 from any background (cyan on gray);
# two objects' colours are at least 29 apart (blue and purple).
_FOREGROUND_DISTANCE = 20.0
_DISTINCT_DISTANCE = 20.0
# In pixels; the smallest object drawn, a star of radius 18, covers about 470.
_MIN_AREA = 100
# What a shape must reach in intersection over union: two like objects that overlap reach up to 0.74 as one, against
# 0.79 and more for convex shapes whose outline wobbles by 2 px. Star and cross have twice the outline for their area.
_MIN_IOU = dict.fromkeys(scenes.SHAPES, 0.75) | {"star": 0.62, "cross": 0.62}
_TEMPLATE_RADIUS = 100.0
# Bounds the brute force over assignments; no description has as many objects, so a picture that does is wrong anyway.
_MAX_CANDIDATES = 8


@dataclass(frozen=True)
class Verdict:
    """Each claim of a description, in words, and whether it holds."""

    claims: dict[str, bool]

    @property
    def right(self) -> bool:
        return all(self.claims.values())


@dataclass(frozen=True)
class Template:
    """One shape at radius 100 about pixel coordinate (128, 128)."""

    mask: np.ndarray  # bool [256, 256]
    area: float  # in squared radii
    offset: tuple[float, float]  # centroid (x, y) seen from the centre, in radii


# --- From an image to a scene ---


def find_objects(image: np.ndarray | Image.Image) -> Scene:
    """The scene that an image shows: uint8 [256, 256, 3] RGB or a PIL image of that size.

    The background and the colours are names from BACKGROUNDS or COLORS. An object that resembles none of SHAPES has
    the shape `UNKNOWN_SHAPE`. Largest object first. Raises ValueError on any other size or dtype.
    """
    lab = rgb_to_lab(_as_array(image))
    coarse = lab[::2, ::2].reshape(-1, 3)
    nearest = _nearest(coarse)
    dominant = int(np.bincount(nearest).argmax())
    background = np.median(coarse[nearest == dominant], axis=0)

    distance = _distance(lab, background)
    found: list[tuple[int, Thing]] = []
    for component in _components(distance > _FOREGROUND_DISTANCE):
        box = ndimage.find_objects(component.astype(np.uint8))[0]
        for part in _split_by_color(lab[box], component[box]):
            interior = ndimage.binary_erosion(part, iterations=2)
            color = np.median(lab[box][interior if interior.any() else part], axis=0)
            # Halfway between object and background lies the true edge, however soft the rim.
            mask = part & (_distance(lab[box], color) < distance[box])
            if mask.sum() < _MIN_AREA:
                continue
            shape, x, y, radius = _fit_shape(mask)
            name = list(_PALETTE)[_nearest(color[None])[0]]
            found.append((int(mask.sum()), Thing(shape, name, x + box[1].start, y + box[0].start, radius)))
    found.sort(key=lambda area_and_thing: -area_and_thing[0])
    return Scene(list(_PALETTE)[dominant], tuple(thing for _, thing in found))


def size_of(radius: float) -> str:
    """ "small", "medium" or "large": the limits lie halfway between the ranges of SIZES."""
    names = list(scenes.SIZES)
    for smaller, larger in itertools.pairwise(names):
        if radius < (scenes.SIZES[smaller][1] + scenes.SIZES[larger][0]) / 2:
            return smaller
    return names[-1]


def rgb_to_lab(rgb: np.ndarray) -> np.ndarray:
    """CIELAB (D65 white, float32 [..., 3]) of sRGB colours (uint8 [..., 3]); IEC 61966-2-1 and CIE 15."""
    value = np.arange(256) / 255
    linear = np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4).astype(np.float32)
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]], np.float32)
    relative = linear[rgb] @ (to_xyz / to_xyz.sum(axis=1, keepdims=True)).T
    f = np.where(relative > (6 / 29) ** 3, np.cbrt(relative), relative / (3 * (6 / 29) ** 2) + 4 / 29)
    x, y, z = np.moveaxis(f, -1, 0)
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1)


def _as_array(image: np.ndarray | Image.Image) -> np.ndarray:
    array = np.asarray(image.convert("RGB") if isinstance(image, Image.Image) else image)
    size = scenes.IMAGE_SIZE
    if array.shape != (size, size, 3) or array.dtype != np.uint8:
        raise ValueError(
            f"got an image of shape {array.shape} and dtype {array.dtype}; the checker takes uint8 [{size}, {size}, 3]:"
            " its sizes and places are in pixels, so draw the image at that size instead of resizing it"
        )
    return array


@functools.cache
def _palette_lab() -> np.ndarray:
    return rgb_to_lab(np.array(list(_PALETTE.values()), np.uint8))


def _distance(lab: np.ndarray, color: np.ndarray) -> np.ndarray:
    """Distance of every pixel of [..., 3] from one colour [3]."""
    difference = lab - color
    return np.sqrt(np.einsum("...c,...c->...", difference, difference))


def _nearest(lab: np.ndarray, colors: np.ndarray | None = None) -> np.ndarray:
    """Index of the nearest of `colors` [k, 3] (default: the palette) for each of `lab` [n, 3]."""
    colors = _palette_lab() if colors is None else colors
    # |a - b|^2 without |a|^2, which is the same for every b.
    return ((colors**2).sum(axis=1) - 2 * lab @ colors.T).argmin(axis=1)


def _components(mask: np.ndarray) -> Iterator[np.ndarray]:
    """Connected parts (bool, of the mask's shape) of at least `_MIN_AREA`, without specks, lines and thin bridges."""
    labels, _ = ndimage.label(ndimage.binary_opening(mask, np.ones((3, 3))))
    for label in np.flatnonzero(np.bincount(labels.ravel()) >= _MIN_AREA):
        if label > 0:
            yield labels == label


def _split_by_color(lab: np.ndarray, component: np.ndarray) -> Iterator[np.ndarray]:
    """Parts of a component that are each of one colour; usually the component itself.

    Anti-aliased rims pass through other palette colours (red on white: pink), but are too thin to survive an opening.
    """
    pixels = lab[component]
    nearest = _nearest(pixels)
    colors: list[np.ndarray] = []
    counts = np.bincount(nearest)
    for index in sorted(np.flatnonzero(counts >= _MIN_AREA), key=lambda i: -counts[i]):
        region = np.zeros_like(component)
        region[component] = nearest == index
        region = ndimage.binary_opening(region, np.ones((5, 5)))
        if region.sum() >= _MIN_AREA:
            color = np.median(lab[region], axis=0)
            # One colour between two palette entries is still one colour.
            if all(np.linalg.norm(color - other) > _DISTINCT_DISTANCE for other in colors):
                colors.append(color)
    if len(colors) < 2:
        yield component
        return
    assigned = _nearest(pixels, np.stack(colors))
    for color_index in range(len(colors)):
        part = np.zeros_like(component)
        part[component] = assigned == color_index
        yield from _components(part)


@functools.cache
def _templates() -> dict[str, Template]:
    n, centre = len(scenes.SHAPES), scenes.IMAGE_SIZE / 2
    images = scenes.draw(
        torch.zeros(n, 3),
        torch.tensor([centre, centre, _TEMPLATE_RADIUS]).expand(n, 1, 3),
        torch.arange(n)[:, None],
        torch.full((n, 1, 3), 255.0),
    )
    templates = {}
    for shape, mask in zip(scenes.SHAPES, images[:, 0].numpy() > 0.5, strict=True):
        rows, columns = np.nonzero(mask)
        x, y = ((float(v.mean()) + 0.5 - centre) / _TEMPLATE_RADIUS for v in (columns, rows))
        templates[shape] = Template(mask, mask.sum() / _TEMPLATE_RADIUS**2, (x, y))
    return templates


def _fit_shape(mask: np.ndarray) -> tuple[str, float, float, float]:
    """The shape with the best intersection over union with a mask, its centre (x, y) and its radius, in pixels.

    Area and centroid give each shape's first fit; the shapes that come near the best one are then moved and scaled
    by steps of 4 % of the radius as long as that helps.
    """
    rows, columns = (v.astype(np.float32) + 0.5 for v in np.nonzero(mask))
    area, centroid = len(rows), (float(columns.mean()), float(rows.mean()))

    def overlap(template: Template, x: float, y: float, radius: float) -> float:
        scale, centre = _TEMPLATE_RADIUS / radius, scenes.IMAGE_SIZE / 2
        i, j = (
            ((v - c) * scale + centre).astype(np.int32).clip(0, scenes.IMAGE_SIZE - 1)
            for v, c in ((rows, y), (columns, x))
        )
        both = np.count_nonzero(template.mask[i, j])
        return both / (area + template.area * radius**2 - both)

    fits: list[tuple[float, str, tuple[float, float, float]]] = []
    for shape, template in _templates().items():
        radius = math.sqrt(area / template.area)
        x, y = (c - o * radius for c, o in zip(centroid, template.offset, strict=True))
        fits.append((overlap(template, x, y, radius), shape, (x, y, radius)))
    # A first fit below 0.5 can't be mended, and a picture full of such objects would take seconds.
    near = max(max(fits)[0] - 0.1, 0.5)
    for index, (iou, shape, fit) in enumerate(fits):
        step, improved = 0.04 * fit[2], iou > near
        while improved:
            moves = [tuple(np.add(fit, step * np.array(move))) for move in itertools.product((-1, 0, 1), repeat=3)]
            best, moved = max((overlap(_templates()[shape], *move), move) for move in moves)
            improved = best > iou + 0.002
            if improved:
                iou, fit = best, moved
        fits[index] = (iou, shape, fit)
    iou, shape, (x, y, radius) = max(fits)
    return (shape if iou >= _MIN_IOU[shape] else UNKNOWN_SHAPE), float(x), float(y), float(radius)


# --- From a scene to a verdict ---


def check(image: np.ndarray | Image.Image, description: Description) -> Verdict:
    """Which claims of `description` an image (as for `find_objects`) bears out."""
    return judge(find_objects(image), description)


def judge(scene: Scene, description: Description) -> Verdict:
    """Which claims of `description` hold in `scene`, for the assignment of things to descriptions that is kindest."""
    verdicts = (_verdict(scene, description, chosen) for chosen in _assignments(scene.things, description.objects))
    return max(verdicts, key=lambda verdict: sum(verdict.claims.values()))


def _matches(thing: Thing, described: Described) -> bool:
    return thing.shape == described.shape and described.color in (None, thing.color)


def _assignments(things: tuple[Thing, ...], objects: tuple[Described, ...]) -> Iterator[tuple[tuple[Thing, ...], ...]]:
    """All ways to give each of `objects` as many matching things as it counts, or those that there are."""
    if not objects:
        yield ()
        return
    first, *others = objects
    candidates = [thing for thing in things if _matches(thing, first)][:_MAX_CANDIDATES]
    # Giving fewer than possible lets a thing that matches two descriptions go to the other one.
    for count in range(min(first.count, len(candidates)), -1, -1):
        for chosen in itertools.combinations(candidates, count):
            left = tuple(thing for thing in things if thing not in chosen)
            for rest in _assignments(left, tuple(others)):
                yield (chosen, *rest)


def _verdict(scene: Scene, description: Description, chosen: tuple[tuple[Thing, ...], ...]) -> Verdict:
    used = [thing for things in chosen for thing in things]
    left = [thing for thing in scene.things if thing not in used]
    claims: dict[str, bool] = {}

    def claim(name: str, holds: bool) -> None:
        # Two descriptions may read alike ("circle" twice): their claims hold together.
        claims[name] = claims.get(name, True) and holds

    for described, things in zip(description.objects, chosen, strict=True):
        name = f"{described.color or ''} {described.shape}".strip()
        complete = len(things) == described.count
        claim(f"{described.count} {name}", complete and not any(_matches(thing, described) for thing in left))
        if described.size is not None:
            claim(f"{name}: {described.size}", complete and all(size_of(t.radius) == described.size for t in things))
        if described.place is not None:
            at_place = all(scenes.place_of(t.x, t.y) == described.place for t in things)
            claim(f"{name}: {described.place}", complete and at_place)
    if description.relation is not None:
        first, second = chosen[:2]
        pairs = list(itertools.product(first, second))
        holds = bool(pairs) and all(_relation_holds(a, b, description.relation) for a, b in pairs)
        claim(f"first {description.relation} second", holds)
    if description.background is not None:
        claim(f"background {description.background}", scene.background == description.background)
    claim("nothing else", not left)
    return Verdict(claims)


def _relation_holds(first: Thing, second: Thing, relation: scenes.Relation) -> bool:
    """Like `scenes.relation_of`, but right up to the diagonal: "left of" holds wherever |dx| > |dy| and dx < 0."""
    dx, dy = first.x - second.x, first.y - second.y
    if abs(dx) > abs(dy):
        return relation == ("left of" if dx < 0 else "right of")
    return abs(dy) > abs(dx) and relation == ("above" if dy < 0 else "below")


# --- Descriptions that are wrong in one claim ---


def alter(description: Description, rng: random.Random) -> tuple[Description, str]:
    """`description` with one of its claims, drawn from `rng`, changed so that no scene fits both; and what changed.

    The word is one of "color", "shape", "count", "size", "place", "relation", "background", "attribution". Every
    description claims counts, so there is always something to change.
    """
    by_claim: dict[str, list[Description]] = {}
    for claim, altered in _alterations(description):
        if contradict(description, altered):
            by_claim.setdefault(claim, []).append(altered)
    claim = rng.choice(list(by_claim))
    return rng.choice(by_claim[claim]), claim


def contradict(a: Description, b: Description) -> bool:
    """Whether no scene can realise both, because no pairing of their objects agrees.

    Relations are compared with each other only, so True is certain and False is not ("a circle in the top left" and
    "a circle right of ..." are not compared).
    """
    if None not in (a.background, b.background) and a.background != b.background:
        return True
    slots_a, slots_b = ([i for i, o in enumerate(d.objects) for _ in range(o.count)] for d in (a, b))
    if len(slots_a) != len(slots_b):
        return True
    return not any(
        all(_agree(a.objects[i], b.objects[j]) for i, j in zip(slots_a, order, strict=True))
        and not _relations_clash(a, b, list(zip(slots_a, order, strict=True)))
        for order in set(itertools.permutations(slots_b))
    )


def _agree(a: Described, b: Described) -> bool:
    """Whether one thing can be both; a count says nothing about a single thing."""
    pairs = ((a.shape, b.shape), (a.color, b.color), (a.size, b.size), (a.place, b.place))
    return all(None in pair or pair[0] == pair[1] for pair in pairs)


def _relations_clash(a: Description, b: Description, pairs: list[tuple[int, int]]) -> bool:
    """Whether things that are object i of `a` and object j of `b`, for (i, j) in `pairs`, can't keep both relations."""
    if a.relation is None or b.relation is None:
        return False
    return any(
        b.relation != (a.relation if (j, m) == (0, 1) else _OPPOSITE[a.relation])
        for (i, j), (k, m) in itertools.permutations(pairs, 2)
        if (i, k) == (0, 1) and (j, m) in ((0, 1), (1, 0))
    )


def _alterations(description: Description) -> Iterator[tuple[str, Description]]:
    """Every change of one claim; among like objects some are no contradiction."""

    def with_object(index: int, **changes: Any) -> Description:
        objects = list(description.objects)
        objects[index] = replace(objects[index], **changes)
        return replace(description, objects=tuple(objects))

    for i, o in enumerate(description.objects):
        yield from (("shape", with_object(i, shape=s)) for s in scenes.SHAPES if s != o.shape)
        yield from (("count", with_object(i, count=c)) for c in (o.count - 1, o.count + 1) if 1 <= c <= 4)
        if o.color is not None:
            yield from (("color", with_object(i, color=c)) for c in scenes.COLORS if c != o.color)
        if o.size is not None:
            yield "size", with_object(i, size="large" if o.size == "small" else "small")
        if o.place is not None:
            yield from (("place", with_object(i, place=p)) for p in scenes.PLACES if p != o.place)
    for (i, a), (j, b) in itertools.combinations(enumerate(description.objects), 2):
        if a.shape != b.shape and a.color != b.color and None not in (a.color, b.color):
            objects = list(description.objects)
            objects[i], objects[j] = replace(a, color=b.color), replace(b, color=a.color)
            yield "attribution", replace(description, objects=tuple(objects))
    if description.relation is not None:
        yield "relation", replace(description, relation=_OPPOSITE[description.relation])
    if description.background is not None:
        others = (b for b in scenes.BACKGROUNDS if b != description.background)
        yield from (("background", replace(description, background=b)) for b in others)


# --- Measuring the checker ---


def to_images(batch: torch.Tensor) -> np.ndarray:
    """What `scenes.render` gives, float [n, 3, height, width] in [0, 1], as uint8 [n, height, width, 3]."""
    return (batch.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def wilson(successes: int, total: int) -> tuple[float, float]:
    """The 95 % score interval of a proportion (Wilson 1927); (0, 1) where nothing was counted."""
    if total == 0:
        return 0.0, 1.0
    z = 1.959964
    p, spread = successes / total, z**2 / total
    centre, half = p + spread / 2, z * math.sqrt(p * (1 - p) / total + spread / total / 4)
    return max(0.0, (centre - half) / (1 + spread)), min(1.0, (centre + half) / (1 + spread))


def measure(count: int, seed: int) -> dict[str, dict[str, dict[str, float]]]:
    """By category and over all: how often a description is found right, and one altered in one claim found wrong."""
    rng = random.Random(seed)
    truth: dict[str, list[bool]] = {category: [] for category in (*scenes.CATEGORIES, "all")}
    rejected: dict[str, list[bool]] = {category: [] for category in truth}
    for index in tqdm(range(count), desc="scenes"):
        category = scenes.CATEGORIES[index % len(scenes.CATEGORIES)]
        description = scenes.sample_description(rng, category)
        altered, _ = alter(description, rng)
        found = find_objects(to_images(scenes.render([scenes.realize(description, rng)]))[0])
        for name in (category, "all"):
            truth[name].append(judge(found, description).right)
            rejected[name].append(not judge(found, altered).right)
    return {name: {"truth": _rate(truth[name]), "rejection": _rate(rejected[name])} for name in truth}


def _rate(results: list[bool]) -> dict[str, float]:
    low, high = wilson(sum(results), len(results))
    return {"successes": sum(results), "total": len(results), "low": low, "high": high}


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the checker on rendered scenes.")
    parser.add_argument("--scenes", type=int, default=2000, help="how many, spread evenly over the categories")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="also write the figures here, as JSON")
    args = parser.parse_args()
    rates = measure(args.scenes, args.seed)
    for category, by_name in rates.items():
        for name, r in by_name.items():
            interval = f"95 % interval {r['low']:.2%} to {r['high']:.2%}"
            print(f"{category:18} {name:10}{r['successes']:5} of {r['total']:5}   {interval}")
    if args.output is not None:
        report = {"scenes": args.scenes, "seed": args.seed, "categories": rates}
        args.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    run_command(main, debug=False)
