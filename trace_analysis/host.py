"""What each thread of the host was doing: which event lies in which, and which one is innermost at any moment."""

from __future__ import annotations

import os
import re
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from trace_analysis.load import HOST, NONE, Trace

# Python packages between the user's code and the operators; the first part of a frame's path.
_LIBRARIES = frozenset({"torch", "diffusers", "transformers", "accelerate", "torchao", "triton", "numpy", "tqdm"})
# The wrappers that put the ranges into a trace: between the user's code and the pipeline, but nobody's.
_RANGES = "utils/ranges.py"
_FRAME = re.compile(r"(?P<file>[^:]*\.py)\((?P<line>\d+)\): .+")
# What Inductor generates is named "c" and 51 letters of a hash (torch/_inductor/codecache.py, code_hash).
_GENERATED = re.compile(r"(?:^|/)c[a-z2-7]{51}\.py$")
_INSTALLED = re.compile(r"(?:^|(?<=/))(?:site-packages|dist-packages|python3\.\d+)/")


@dataclass(frozen=True)
class Timeline:
    """One thread cut into pieces, in order and without holes: `event` is the innermost one there, or NONE.

    start, end: nanoseconds (int64 [n]); event: indices into the trace (int64 [n]).
    """

    start: np.ndarray
    end: np.ndarray
    event: np.ndarray


class Host:
    """The host's events of a trace, nested.

    parent: of each event of the trace the innermost one around it on its thread, or NONE (int64).
    """

    def __init__(self, trace: Trace):
        self.trace = trace
        self.parent = np.full(len(trace), NONE, np.int64)
        self.timelines: dict[int, Timeline] = {}
        events = trace.of(HOST)
        lanes = trace.lane[events]
        for lane in np.unique(lanes):
            self.timelines[int(lane)] = self._nest(events[lanes == lane])

    def _nest(self, events: np.ndarray) -> Timeline:
        starts, ends = self.trace.start[events].tolist(), self.trace.end[events].tolist()
        parents: list[int] = []
        stack: list[int] = []
        reach: list[int] = []  # ends of the stack's events
        moments: list[int] = []
        inner: list[int] = []  # from moments[i] on, inner[i] is innermost
        index = events.tolist()
        for event, start, end in zip(index, starts, ends, strict=True):
            while reach and reach[-1] <= start:
                moments.append(reach.pop())
                stack.pop()
                inner.append(stack[-1] if stack else NONE)
            parents.append(stack[-1] if stack else NONE)
            stack.append(event)
            # An event that outlasts the one around it, by a clock's grain, ends with it.
            reach.append(min(end, reach[-1]) if reach else end)
            moments.append(start)
            inner.append(event)
        while reach:
            moments.append(reach.pop())
            stack.pop()
            inner.append(stack[-1] if stack else NONE)
        self.parent[events] = parents
        start = np.array(moments, np.int64)
        return Timeline(start[:-1], start[1:], np.array(inner[:-1], np.int64))

    @cached_property
    def own(self) -> np.ndarray:
        """Of each event the time in which it was innermost, in nanoseconds (int64)."""
        own = np.zeros(len(self.trace), np.int64)
        for line in self.timelines.values():
            inside = line.event != NONE
            np.add.at(own, line.event[inside], (line.end - line.start)[inside])
        return own

    def around(self, event: int) -> Iterator[int]:
        """The event and those around it, from the inside."""
        while event != NONE:
            yield event
            event = int(self.parent[event])

    def operators(self, event: int) -> tuple[str, ...]:
        """Names of the operators around a call, the outermost first."""
        names = [self.trace.name_of(e) for e in self.around(event) if self._category(e) == "cpu_op"]
        return tuple(reversed(names))

    def frames(self, event: int) -> list[str]:
        """Python frames around a call, from the inside: "file.py(line): function"; empty without stacks."""
        return [self.trace.name_of(e) for e in self.around(event) if self._category(e) == "python_function"]

    def innermost(self, lane: int, moment: int) -> int:
        """The innermost event on a thread at a moment, or NONE."""
        line = self.timelines.get(lane)
        if line is None or not len(line.start):
            return NONE
        at = int(np.searchsorted(line.start, moment, side="right")) - 1
        return int(line.event[at]) if at >= 0 and moment < line.end[at] else NONE

    def _category(self, event: int) -> str:
        return self.trace.categories[self.trace.category[event]]


@dataclass(frozen=True)
class Source:
    """Where a call comes from, as "file.py(line): function"; the line is where Kineto saw the function, its first one.

    outside_torch: innermost frame that isn't PyTorch's; own: innermost that isn't a library's either.
    """

    outside_torch: str | None
    own: str | None


def source(frames: list[str]) -> Source:
    """From frames as `Host.frames` gives them."""
    places = [(frame, found["file"]) for frame in frames if (found := _FRAME.fullmatch(frame))]
    outside = next((frame for frame, file in places if not _in_torch(file)), None)
    own = next((frame for frame, file in places if not _in_library(file)), None)
    return Source(outside, own)


def _in_torch(file: str) -> bool:
    return _INSTALLED.split(file)[-1].split("/")[0] == "torch" or file.startswith("<")


def _in_library(file: str) -> bool:
    first = _INSTALLED.split(file)[-1].split("/")[0]
    return (
        file.startswith("<")
        or file.endswith(_RANGES)
        or _INSTALLED.search(file) is not None
        or _GENERATED.search(file) is not None
        or first in _LIBRARIES
        or (first.removesuffix(".py") in sys.stdlib_module_names and _in_stdlib(file))
    )


@lru_cache(maxsize=65536)
def _in_stdlib(file: str) -> bool:
    """A path from where Python's own modules lie: Kineto cuts the folders that they are imported from."""
    return os.path.isfile(os.path.join(sysconfig.get_path("stdlib"), file))
