"""What is taken for given of the sizes in a range: a model doesn't look at them when it is called.

torch.export and the compiler note as guards what they relied on beyond the ranges: that two inputs have as many tokens,
or that a size is what it was in the example, for a kernel was made for that one. The former always holds, the latter
doesn't, and both look alike; so each guard is tried on sizes throughout the ranges.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import sympy
import torch

from export import sizes
from export.manifest import Range
from export.sizes import Sizes, Specs

_APART = 24  # values of each size, evenly apart; besides the first two and the last
_SHOWN = 120  # characters of a guard


def broken(graph: torch.fx.GraphModule, specs: Specs, ranges: dict[str, Range]) -> str | None:
    """A guard of a graph for these inputs, and sizes in the ranges of which it isn't true; None if there is none."""
    shapes = {node.name: node.meta["val"].shape for node in graph.graph.find_nodes(op="placeholder")}
    open_sizes = [side for shape in shapes.values() for side in shape if isinstance(side, torch.SymInt)]
    if not open_sizes:
        return None
    guards = [guard.expr for guard in open_sizes[0].node.shape_env.guards]
    for one in _sizes(sizes.of(specs), ranges):
        known: dict[Any, sympy.Integer] = {}
        for name, spec in sizes.at(specs, one).items():
            for side, value in zip(shapes[name.replace(".", "_")], spec.shape, strict=True):  # export's names
                if isinstance(side, torch.SymInt):
                    known[side.node._expr] = sympy.Integer(value)  # not .expr, from which guards were drawn already
        for guard in guards:
            if guard.xreplace(known) != sympy.true:
                where = ", ".join(f"{one[name]} {name.replace('_', ' ')}" for name in ranges)
                text = str(guard)
                return f"{text if len(text) <= _SHOWN else text[:_SHOWN] + '...'}, which isn't so of {where}"
    return None


def _sizes(own: Sizes, ranges: dict[str, Range]) -> Iterator[Sizes]:
    """Sizes in the ranges, those of the others as they are."""
    for values in itertools.product(*map(_values, ranges.values())):
        yield {**own, **dict(zip(ranges, values, strict=True))}


def _values(one: Range) -> list[int]:
    """An odd number apart, so that they aren't all multiples of what the first is a multiple of."""
    step = (one.largest - one.smallest) // _APART | 1
    between = range(one.smallest, one.largest + 1, step)
    return sorted({*between, min(one.smallest + 1, one.largest), one.largest})
