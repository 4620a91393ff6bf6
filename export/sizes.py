"""The sizes in which calls of a region may differ and still be one model's, compiled for a range of them.

They follow from the image's size and the text's length; batch and features are fixed in every model.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from torch.export import Dim

from export.manifest import Model, Range, TensorSpec
from export.regions import Inputs, contiguous_strides

Specs = dict[str, TensorSpec]
Sizes = dict[str, int]

_TEXT, _IMAGE = "text_tokens", "image_tokens"
# By input: the dimensions that aren't fixed, and the size that each has, or the two that it is the sum of.
_DIMENSIONS: dict[str, dict[int, tuple[str, ...]]] = {
    "hidden_states": {1: (_IMAGE,)},
    "img_ids": {0: (_IMAGE,)},
    "encoder_hidden_states": {1: (_TEXT,)},
    "context": {1: (_TEXT,)},
    "txt_ids": {0: (_TEXT,)},
    "image_rotary_emb": {0: (_TEXT, _IMAGE)},
    "rotary": {0: (_TEXT, _IMAGE)},
    "sample": {2: ("latent_height",), 3: ("latent_width",)},
}


def of(specs: Specs) -> Sizes:
    """The sizes of a region's inputs, by name."""
    return {
        names[0]: spec.shape[dimension]
        for name, spec in specs.items()
        for dimension, names in _dimensions(name, spec).items()
        if len(names) == 1
    }


def at(specs: Specs, sizes: Sizes) -> Specs:
    """Contiguous inputs like these, but with other sizes; `sizes` are all that `of` finds in them."""
    found = {}
    for name, spec in specs.items():
        dimensions = _dimensions(name, spec)
        shape = tuple(
            sum(sizes[part] for part in dimensions[i]) if i in dimensions else side for i, side in enumerate(spec.shape)
        )
        found[name] = replace(spec, shape=shape, stride=contiguous_strides(shape))
    return found


def contiguous(specs: Specs) -> Specs:
    """As a model for a range takes them: torch.export takes the strides of a view for fixed, without a word."""
    return {name: replace(spec, stride=contiguous_strides(spec.shape)) for name, spec in specs.items()}


def ranges(calls: list[Specs]) -> dict[str, Range]:
    """From the smallest to the largest: the sizes in which these calls of one region differ."""
    found = {}
    for name in of(calls[0]):
        sizes = [of(specs)[name] for specs in calls]
        if min(sizes) < max(sizes):
            found[name] = Range(min(sizes), max(sizes))
    return found


def area(specs: Specs) -> int:
    """The product of all sizes, by which the calls of one region are put in order."""
    return math.prod(of(specs).values())


def dynamic_shapes(inputs: Inputs, ranged: dict[str, Range], sizes: Sizes) -> dict[str, Any] | None:
    """`inputs`, of these sizes, with these ranges as torch.export takes them; None without ranges: all are fixed.

    torch.export has no word for the sum of two ranges, and finds it out; that a call keeps to it `refusal` checks.
    """
    if not ranged:
        return None
    named = {name: Dim(name, min=one.smallest, max=one.largest) for name, one in ranged.items()}

    def dimension(names: tuple[str, ...]) -> Any:
        varying = [name for name in names if name in named]
        if len(varying) > 1:
            return Dim.DYNAMIC
        rest = sum(sizes[name] for name in names if name not in named)
        return None if not varying else named[varying[0]] + rest if rest else named[varying[0]]

    shapes: dict[str, Any] = {}
    for name, value in inputs.items():
        of_tensor = {i: dimension(names) for i, names in _DIMENSIONS.get(name, {}).items()}
        shapes[name] = tuple(of_tensor for _ in value) if isinstance(value, tuple) else of_tensor
    return shapes


def refusal(model: Model, wanted: Specs) -> str | None:
    """Why a model doesn't take these inputs, naming both sides; None if it does."""
    there = model.inputs
    if model.ranges and there.keys() == wanted.keys():
        here, wanted = of(wanted), contiguous(wanted)
        for name, one in model.ranges.items():
            if name not in here or not one.smallest <= here[name] <= one.largest:
                return f"takes {words(name, one)}, it comes with {here.get(name, 'none')}"
        there = at(there, {**here, **of(there), **{name: here[name] for name in model.ranges}})
    for name in (*wanted, *there):
        taken, given = there.get(name), wanted.get(name)
        if taken is None or given is None:
            if taken is not given:
                return f"takes {name} {taken or 'not at all'}, it comes {given or 'not at all'}"
        elif taken != given:
            alike = taken.short == given.short
            return f"takes {name} {taken if alike else taken.short}, it comes {given if alike else given.short}"
    return None


def words(name: str, one: Range) -> str:
    """A size's range as it is told: "64 to 512 text tokens"."""
    return f"{one.smallest} to {one.largest} {name.replace('_', ' ')}"


def _dimensions(name: str, spec: TensorSpec) -> dict[int, tuple[str, ...]]:
    """Of an input as manifests name it, a tuple's members apart; those that it has."""
    known = _DIMENSIONS.get(name.partition(".")[0], {})
    return {dimension: names for dimension, names in known.items() if dimension < len(spec.shape)}
