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

int main(int, char** x) {
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
    numbers = [str(x) for x in (first, tall, wide, group)]
    lines = subprocess.run([program, *numbers], check=True, capture_output=True, text=True).stdout.splitlines()
    return [(int(a), int(b), int(c)) for a, b, c in (line.split() for line in lines)]


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
    ("tall", "depth", "group"),
    [(36, 3072, 36), (42, 3072, 42), (43, 3072, 22), (68, 3072, 34), (144, 3072, 36), (36, 15360, 8), (1, 1 << 20, 1)],
)
def test_rows_that_stay_in_the_cache(tall: int, depth: int, group: int) -> None:
    assert wgmma_linear.rows_at_once(tall, depth) == group
