"""A Chrome trace as torch.profiler (Kineto) writes it, from its file to columns.

The format: pytorch/kineto, libkineto/src/output_json.cpp and CuptiActivity.cpp.
"""

from __future__ import annotations

from array import array
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trace_analysis.costs import Shapes, ShapesCache, has_cost
from trace_analysis.stream import TraceStream
from utils.errors import UsageError

GPU = frozenset({"kernel", "gpu_memcpy", "gpu_memset"})
CALLS = frozenset({"cuda_runtime", "cuda_driver"})
HOST = frozenset({"cpu_op", "user_annotation", "python_function", *CALLS})
NONE = -1
_LATEST = 4 * 10**15  # microseconds; a sum of two is still an int64 of nanoseconds


@dataclass(frozen=True, eq=False)
class Trace:
    """The events with a duration, in the order of time (of two with the same times, the outer one first).

    Columns, one entry an event: `name` and `category` index `names` and `categories` (int32), `start` and `end` are
    integer nanoseconds on the trace's own clock (int64), `lane` indexes `lanes` (int32): process and thread on the
    host, device and stream on a GPU. `correlation` ties a call to what it launched; NONE where there is none (int64).
    shapes: inputs of the operators whose cost is known, by event; equal ones are one object.
    properties: the file's other keys, "deviceProperties" among them.
    incomplete: what was wrong with a file that was read only in part.
    skipped: events with a duration that couldn't be read (no name, a time out of range, ...).
    """

    path: Path
    names: tuple[str, ...]
    categories: tuple[str, ...]
    lanes: tuple[tuple[Any, Any], ...]
    name: np.ndarray
    category: np.ndarray
    start: np.ndarray
    end: np.ndarray
    lane: np.ndarray
    correlation: np.ndarray
    shapes: dict[int, Shapes]
    properties: dict[str, Any]
    incomplete: str | None
    skipped: int

    def __len__(self) -> int:
        return len(self.start)

    def of(self, categories: Collection[str]) -> np.ndarray:
        """Indices of the events of these categories, in the order of time; int64."""
        codes = [code for code, name in enumerate(self.categories) if name in categories]
        return np.flatnonzero(np.isin(self.category, codes))

    def name_of(self, event: int) -> str:
        return self.names[self.name[event]]

    @property
    def has_gpu(self) -> bool:
        return not GPU.isdisjoint(self.categories)


class _Columns:
    """What `load` collects, before it is sorted."""

    def __init__(self) -> None:
        self.start, self.end, self.correlation, self.external = array("q"), array("q"), array("q"), array("q")
        self.name, self.category, self.lane = array("i"), array("i"), array("i")
        self.names: dict[str, int] = {}
        self.categories: dict[str, int] = {}
        self.lanes: dict[tuple[Any, Any], int] = {}
        self.shapes: dict[int, Shapes] = {}
        self.shapes_of = ShapesCache()
        self.skipped = 0


def load(path: Path | str) -> Trace:
    """Read a trace, gzipped or plain; its first bytes decide which, not its name. Shows a bar past 2 s.

    A file that ends too early, as a killed profiler leaves one, is read as far as it is whole; `incomplete` says so.

    Raises:
        UsageError: it can't be read, isn't a Chrome trace, or holds no events with a duration.
    """
    path = Path(path)
    stream, columns = TraceStream(path), _Columns()
    for number, row in enumerate(stream):
        if not isinstance(row, dict):
            raise UsageError(f"{path} is not a trace: its event {number} is not an object")
        if row.get("ph") == "X":  # complete events; the others name threads, draw arrows and mark moments
            try:
                _add(columns, row)
            except (ValueError, TypeError):
                columns.skipped += 1
    if not columns.start:
        damaged = f" ({columns.skipped} can't be read)" if columns.skipped else ""
        raise UsageError(f"{path} holds no events with a duration{damaged}: was anything run while profiling?")
    return _sorted(path, stream, columns)


def _add(columns: _Columns, row: dict[str, Any]) -> None:
    """One event. Raises ValueError or TypeError where something is wrong about it, before anything is added."""
    name, category, arguments = row.get("name"), row.get("cat", ""), row.get("args") or {}
    if not isinstance(name, str) or not isinstance(category, str) or not isinstance(arguments, dict):
        raise ValueError
    start, duration = _nanoseconds(row.get("ts")), _nanoseconds(row.get("dur"))
    if duration < 0:
        raise ValueError
    lane = row.get("pid", 0), row.get("tid", 0)
    if category in GPU:
        lane = arguments.get("device", lane[0]), arguments.get("stream", lane[1])
    columns.lane.append(columns.lanes.setdefault(lane, len(columns.lanes)))  # a TypeError for a list
    if category == "cpu_op" and "Input Dims" in arguments and has_cost(name):
        with suppress(ValueError, TypeError):  # an operator without shapes has a time all the same
            columns.shapes[len(columns.start)] = columns.shapes_of(arguments)
    columns.name.append(columns.names.setdefault(name, len(columns.names)))
    columns.category.append(columns.categories.setdefault(category, len(columns.categories)))
    columns.start.append(start)
    columns.end.append(start + duration)
    columns.correlation.append(_identifier(arguments.get("correlation")))
    columns.external.append(_identifier(arguments.get("External id")))


def _identifier(value: Any) -> int:
    return value if type(value) is int and 0 <= value < 2**63 else NONE


def _nanoseconds(value: Any) -> int:
    """A time of the file, in microseconds there, exactly; digits beyond the nanosecond are cut."""
    if type(value) is str:
        whole, point, fraction = value.partition(".")
        if point and fraction.isdecimal() and whole.lstrip("-").isdecimal() and len(whole) < 18:
            if not -_LATEST < int(whole) < _LATEST:
                raise ValueError
            sign = -1 if whole[0] == "-" else 1
            return int(whole) * 1000 + sign * int(f"{fraction}00"[:3])
        value = float(value)  # with an exponent, or wrong
    elif type(value) is not int:  # nothing, a word, a list
        raise ValueError
    if not -_LATEST < value < _LATEST:  # false for NaN, too
        raise ValueError
    return round(value * 1000)


def _sorted(path: Path, stream: TraceStream, columns: _Columns) -> Trace:
    """Everything in an order that doesn't depend on the file's."""
    names, name = _in_order(columns.names, columns.name)
    categories, category = _in_order(columns.categories, columns.category)
    lanes, lane = _in_order(columns.lanes, columns.lane)
    start, end, correlation, external = (
        np.frombuffer(column, np.int64)
        for column in (columns.start, columns.end, columns.correlation, columns.external)
    )
    order = np.lexsort((correlation, name, lane, category, external, -end, start))
    place = np.empty(len(order), np.int64)
    place[order] = np.arange(len(order))
    return Trace(
        path=path,
        names=names,
        categories=categories,
        lanes=lanes,
        name=name[order],
        category=category[order],
        start=start[order],
        end=end[order],
        lane=lane[order],
        correlation=correlation[order],
        shapes={int(place[event]): shapes for event, shapes in columns.shapes.items()},
        properties=stream.properties,
        incomplete=stream.incomplete,
        skipped=columns.skipped,
    )


def _in_order(table: dict[Any, int], codes: array) -> tuple[tuple[Any, ...], np.ndarray]:
    """A table's entries sorted by their text, and the codes for that order."""
    entries = sorted(table, key=str)
    rank = np.empty(len(table), np.int32)
    rank[[table[entry] for entry in entries]] = np.arange(len(table), dtype=np.int32)
    return tuple(entries), rank[np.frombuffer(codes, np.int32)]
