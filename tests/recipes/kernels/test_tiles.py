"""The order of a GEMM's tiles (kernels/tiles.cuh), compiled for a CPU."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from recipes import wgmma_linear
from recipes.kernels import cuda_kernel

PROGRAM = """
#include <cstdio>
#include <cstdlib>
#define __device__
constexpr int ROWS = 128;
#include "tiles.cuh"
#include "units.cuh"

int main(int many, char** x) {
  if (many == 5) {
    const Units units{atoi(x[1]), atoi(x[2]), atoi(x[3])};
    for (int number = 0; number < units.number(); number++) {
      const Unit unit = units.at(number, atoi(x[4]));
      printf("%d %d %d %d\\n", unit.tile, unit.begin, unit.end, unit.part);
    }
    return 0;
  }
  const Tiles tiles{atoi(x[1]), atoi(x[2]), atoi(x[3]), atoi(x[4])};
  for (int tile = 0; tile < tiles.number(); tile++) {
    const Place place = tiles[tile];
    printf("%d %d %d\\n", place.second, place.row, place.across);
  }
}
"""
Place = tuple[int, int, int]  # stream, first row, number among those side by side


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiles")
    (folder / "order.cc").write_text(PROGRAM)
    kernels = Path(cuda_kernel.__file__).parent
    command = ["g++", "-std=c++17", f"-I{kernels}", "order.cc", "-o", "order"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    return folder / "order"


def order(program: Path, first: int, tall: int, wide: int, group: int) -> list[Place]:
    numbers = [str(x) for x in (first, tall, wide, group, "")]
    return [(a, b, c) for a, b, c in printed(program, *numbers)]


def printed(program: Path, *numbers: str) -> list[list[int]]:
    lines = subprocess.run([program, *numbers], check=True, capture_output=True, text=True).stdout.splitlines()
    return [[int(x) for x in line.split()] for line in lines]


@pytest.mark.parametrize(
    ("first", "tall", "wide", "group"),
    [
        (36, 36, 112, 36),
        (32, 36, 48, 36),
        (144, 144, 5, 36),
        (128, 144, 3, 36),
        (5, 7, 3, 3),
        (1, 1, 1, 1),
        (2, 9, 4, 4),
    ],
)
def test_each_tile_once(program: Path, first: int, tall: int, wide: int, group: int) -> None:
    found = order(program, first, tall, wide, group)
    rows = [(0, 128 * i) for i in range(first)] + [(1, 128 * i) for i in range(tall - first)]
    assert sorted(found) == sorted((*row, across) for row in rows for across in range(wide))
    # In a group all rows of a column after the other, and no row of the next one's before its last column.
    expected = [
        (*row, across)
        for begin in range(0, tall, group)
        for across in range(wide)
        for row in rows[begin : begin + group]
    ]
    assert found == expected


@pytest.mark.parametrize(
    ("tiles", "blocks", "depth", "parts"),
    [
        *((1728, 132, 96, 4), (2304, 132, 24, 1), (4032, 132, 96, 1), (576, 132, 120, 2)),
        *((576, 132, 96, 2), (576, 132, 24, 1), (264, 132, 24, 1), (5, 132, 48, 3), (5, 132, 120, 4)),
        *((5, 132, 31, 1), (140, 132, 2, 1)),
    ],
)
def test_tiles_that_are_left_are_shared(program: Path, tiles: int, blocks: int, depth: int, parts: int) -> None:
    assert wgmma_linear.shared_by(tiles, blocks, depth) == parts
    left = tiles % blocks if parts > 1 else 0
    units = printed(program, *(str(x) for x in (tiles - left, left, parts, depth)))
    assert len(units) == tiles + left * (parts - 1)
    assert len(units) - (tiles - left) <= blocks, "those that share a tile run at once"
    for tile in range(tiles):
        own = [unit for unit in reversed(units) if unit[0] == tile]  # who adds up what others leave comes after them
        assert [unit[3] for unit in own] == list(range(parts if tile >= tiles - left else 1))
        begins, ends = ([unit[i] for unit in own] for i in (1, 2))
        assert (begins[0], ends[-1]) == (0, depth)
        assert begins[1:] == ends[:-1]
        assert len(own) == 1 or all(end - begin >= 16 for begin, end in zip(begins, ends, strict=True))


@pytest.mark.parametrize(
    ("tall", "depth", "group"),
    [(36, 3072, 36), (42, 3072, 42), (43, 3072, 22), (68, 3072, 34), (144, 3072, 36), (36, 15360, 8), (1, 1 << 20, 1)],
)
def test_rows_that_stay_in_the_cache(tall: int, depth: int, group: int) -> None:
    assert wgmma_linear.rows_at_once(tall, depth) == group
