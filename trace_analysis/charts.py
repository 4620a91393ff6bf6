"""Charts as SVG: labelled lines of coloured pieces over an axis in milliseconds, with a legend."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape

import numpy as np

from trace_analysis.load import NONE
from trace_analysis.tables import printable

_WIDTH, _LEFT, _ROW = 1160, 150, 26  # pixels: of a chart, of its labels, of a line
_TICKS = 5
_CELLS = 2 * (_WIDTH - _LEFT)  # half pixels: nothing narrower is drawn


@dataclass(frozen=True)
class Piece:
    """start, length: fractions of the axis; what: shown when the pointer rests on it; kind: for colour and legend."""

    start: float
    length: float
    kind: str
    what: str


@dataclass(frozen=True)
class Line:
    label: str
    pieces: tuple[Piece, ...]


def visible(start: np.ndarray, end: np.ndarray, begin: int, finish: int) -> list[tuple[float, float, int]]:
    """Of intervals in nanoseconds those that can be seen between `begin` and `finish`: start, length, number.

    Where several fall into one half pixel, the longest stands for all; so there are no more than half pixels.
    """
    scale = _CELLS / max(1, finish - begin)
    left = np.clip((start - begin) * scale, 0, _CELLS - 1)
    right = np.clip((end - begin) * scale, 0, _CELLS)
    owner = np.full(_CELLS, NONE, np.int64)
    for i in np.argsort(right - left, kind="stable"):  # longer ones over shorter ones
        first = int(left[i])
        owner[first : max(first + 1, round(float(right[i])))] = i
    borders = np.concatenate(([0], np.flatnonzero(owner[1:] != owner[:-1]) + 1, [_CELLS]))
    return [
        (low / _CELLS, (high - low) / _CELLS, int(owner[low]))
        for low, high in zip(borders[:-1].tolist(), borders[1:].tolist(), strict=True)
        if owner[low] != NONE
    ]


def chart(lines: list[Line], milliseconds: float, colours: dict[str, str]) -> str:
    """`milliseconds`: the axis' length; `colours`: by kind, in the order of the legend."""
    height = _ROW * len(lines) + 30
    width = _WIDTH - _LEFT
    shapes = []
    for number in range(_TICKS + 1):
        x = _LEFT + width * number / _TICKS
        last = number == _TICKS
        label, anchor = f"{milliseconds * number / _TICKS:.3g}" + (" ms" if last else ""), "end" if last else "middle"
        shapes.append(f'<path d="M{x:.1f} 0V{height - 22}" stroke="#d0d7de"/>')
        shapes.append(f'<text x="{x:.1f}" y="{height - 6}" text-anchor="{anchor}" fill="#57606a">{label}</text>')
    for row, line in enumerate(lines):
        y = row * _ROW + 4
        label = escape(printable(line.label, 22))
        shapes.append(f'<text x="{_LEFT - 8}" y="{y + 13}" text-anchor="end" fill="#1b1f24">{label}</text>')
        shapes += [
            f'<rect x="{_LEFT + piece.start * width:.1f}" y="{y}" width="{max(piece.length * width, 0.3):.1f}" '
            f'height="{_ROW - 8}" fill="{colours[piece.kind]}"><title>{escape(printable(piece.what))}</title></rect>'
            for piece in line.pieces
        ]
    used = {piece.kind for line in lines for piece in line.pieces}
    legend = [f'<span style="--c:{colours[kind]}">{escape(kind)}</span>' for kind in colours if kind in used]
    return (
        f'<div class="wide"><svg width="{_WIDTH}" height="{height}" role="img">{"".join(shapes)}</svg></div>'
        f'<div class="legend">{"".join(legend)}</div>'
    )
