"""What export or the compiler takes for given of sizes in a range: refused where it isn't so of all of them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from export import assumptions, build, regions, sizes
from export.build import Call
from export.manifest import Range
from utils.errors import UserError

SIDES = {"latent_height": Range(16, 24), "latent_width": Range(20, 200)}
INPUTS = {"sample": torch.zeros(1, 4, 24, 200)}
SPECS = build.input_specs(INPUTS)


@torch.library.custom_op("flux_fast_test::in_tiles", mutates_args=())
def in_tiles(x: torch.Tensor, tiles: int) -> torch.Tensor:
    return x.clone()


@in_tiles.register_fake
def _(x: torch.Tensor, tiles: int) -> torch.Tensor:
    range(tiles)  # as where a kernel is compiled for one number of tiles: the example's becomes a constant
    return torch.empty_like(x)


class InTiles(nn.Module):
    """Its operator takes the number of tiles for given."""

    def forward(self, *, sample: torch.Tensor) -> torch.Tensor:
        return in_tiles(sample, -(-sample.shape[2] * sample.shape[3] // 64)) + 1


class Plain(nn.Module):
    def forward(self, *, sample: torch.Tensor) -> torch.Tensor:
        return sample + 1


def exported(module: nn.Module, ranges: dict[str, Range]) -> torch.fx.GraphModule:
    shapes = sizes.dynamic_shapes(INPUTS, ranges, sizes.of(SPECS))
    return torch.export.export(module, (), INPUTS, dynamic_shapes=shapes, strict=False).module(check_guards=False)


@pytest.mark.parametrize(
    ("assume", "words"),
    [
        (lambda height, width: height % 8 == 0, "which isn't so of 17 latent height, 20 latent width"),
        (lambda height, width: width % 2 == 0, "which isn't so of 16 latent height, 21 latent width"),
        (lambda height, width: height > 16, "which isn't so of 16 latent height, 20 latent width"),
        (lambda height, width: width > 199, "which isn't so of 16 latent height, 20 latent width"),
        (lambda height, width: -(-height * width // 64) == 75, "which isn't so of 16 latent height, 20 latent width"),
        (lambda height, width: height * (width + 64) % (width + 64) == 0, None),
        (lambda height, width: (height * width + 7) // 8 * 8 >= height * width, None),
    ],
)
def test_what_is_noted_beyond_the_ranges(assume: Callable, words: str | None) -> None:
    graph = exported(Plain(), SIDES)
    assert assumptions.broken(graph, SPECS, SIDES) is None
    (node,) = graph.graph.find_nodes(op="placeholder")
    assert bool(assume(*node.meta["val"].shape[2:])), "it is so of the example"
    found = assumptions.broken(graph, SPECS, SIDES)
    assert found is None if words is None else words in str(found)


def test_a_build_refuses_what_an_operator_takes_for_given() -> None:
    """Of a single size torch.export sees to it itself, of what comes of two it doesn't."""
    with pytest.raises(UserError) as raised:
        build.compile_call(Call(regions.DECODER, InTiles(), INPUTS, SIDES), {}, embed_weights=False)
    said = str(raised.value)
    assert said.startswith(
        "the vae_decoder can't be compiled for 16 to 24 latent height, 20 to 200 latent width (it is taken for given "
    ), said
    assert said.endswith("which isn't so of 16 latent height, 20 latent width): build it without --dynamic"), said


def test_fixed_sizes_leave_nothing_open() -> None:
    assert assumptions.broken(exported(InTiles(), {}), SPECS, {}) is None
