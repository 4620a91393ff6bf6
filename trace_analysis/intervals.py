"""Arithmetic on half-open intervals of integer nanoseconds, as arrays [n] of starts and of ends."""

from __future__ import annotations

import numpy as np


def union(start: np.ndarray, end: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same points as disjoint intervals, in order; those that touch become one, empty ones vanish."""
    filled = end > start
    start, end = start[filled], end[filled]
    if not len(start):
        return start, end
    order = np.argsort(start, kind="stable")
    start, reach = start[order], np.maximum.accumulate(end[order])
    first = np.concatenate(([True], start[1:] > reach[:-1]))
    last = np.concatenate((first[1:], [True]))
    return start[first], reach[last]


class Union:
    """Points covered by some intervals, to be measured between any two moments."""

    def __init__(self, start: np.ndarray, end: np.ndarray):
        self.start, self.end = union(start, end)
        self._before = np.concatenate(([0], np.cumsum(self.end - self.start)))

    def until(self, moment: np.ndarray | int) -> np.ndarray:
        """Nanoseconds covered before each moment."""
        index = np.searchsorted(self.start, moment, side="right")
        if not len(self.start):
            return np.zeros_like(index)
        last = np.maximum(index - 1, 0)
        beyond = np.where(index > 0, np.maximum(self.end[last] - np.asarray(moment), 0), 0)
        return self._before[index] - beyond

    def holds(self, moment: np.ndarray) -> np.ndarray:
        """Whether each moment is covered; bool."""
        if not len(self.start):
            return np.zeros(len(moment), bool)
        last = np.searchsorted(self.start, moment, side="right") - 1
        return (last >= 0) & (moment < self.end[np.maximum(last, 0)])

    def within(self, start: int, end: int) -> int:
        """Nanoseconds covered from `start` to `end`."""
        return int(self.until(end) - self.until(start)) if end > start else 0

    def holes(self, start: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """What isn't covered from `start` to `end`."""
        low = int(np.searchsorted(self.end, start, side="right"))
        high = int(np.searchsorted(self.start, end, side="left"))
        begins = np.concatenate(([start], self.end[low:high]))
        ends = np.concatenate((self.start[low:high], [end]))
        filled = ends > begins
        return begins[filled], ends[filled]


class Total:
    """Nanoseconds of some intervals between any two moments, those that overlap counted each."""

    def __init__(self, start: np.ndarray, end: np.ndarray):
        self.start, self.end = np.sort(start), np.sort(end)
        self._starts = np.concatenate(([0], np.cumsum(self.start)))
        self._ends = np.concatenate(([0], np.cumsum(self.end)))

    def within(self, start: int, end: int) -> int:
        """Sums beyond 64 bits wrap, and wrap back in the difference."""
        return int((self._until(end) - self._until(start))[0]) if end > start else 0

    def _until(self, moment: int) -> np.ndarray:
        begun = np.searchsorted(self.start, [moment], side="right")
        ended = np.searchsorted(self.end, [moment], side="right")
        return moment * (begun - ended) - self._starts[begun] + self._ends[ended]
