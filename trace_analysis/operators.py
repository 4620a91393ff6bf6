"""Operators on the host, and their own time: without that of the operators they call."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from trace_analysis.load import Event, Trace
from trace_analysis.ranges import Moments

OPERATOR = "cpu_op"


@dataclass(frozen=True)
class OperatorTime:
    """Own host time of all calls of one operator, in nanoseconds."""

    name: str
    count: int
    own_ns: int


def operator_times(trace: Trace, when: Moments | None = None) -> tuple[OperatorTime, ...]:
    """Every operator by its own time, the longest first; `when`: only calls that begin at these moments."""
    by_thread: dict[tuple, list[Event]] = defaultdict(list)
    for event in trace.of({OPERATOR}):
        by_thread[event.process, event.thread].append(event)
    counts: dict[str, int] = defaultdict(int)
    totals: dict[str, int] = defaultdict(int)
    for events in by_thread.values():
        for event, own in own_times(events):
            if when is None or when.hold(event.start_ns):
                counts[event.name] += 1
                totals[event.name] += own
    times = (OperatorTime(name, counts[name], total) for name, total in totals.items())
    return tuple(sorted(times, key=lambda time: (-time.own_ns, time.name)))


def own_times(events: Iterable[Event]) -> Iterator[tuple[Event, int]]:
    """Each event of one thread with its duration less that of the events nested in it directly, in nanoseconds.

    Of two events with the same start and end the one that Kineto numbered first holds the other.
    """
    stack: list[tuple[Event, int]] = []  # events that are still open, each with the time of its children so far
    for event in sorted(events, key=_outermost_first):
        while stack and stack[-1][0].end_ns <= event.start_ns:
            yield _closed(stack)
        if stack:
            parent, inside = stack[-1]
            # A child that ends after its parent, by a clock's grain, takes no more from it than they share.
            stack[-1] = parent, inside + min(event.end_ns, parent.end_ns) - event.start_ns
        stack.append((event, 0))
    while stack:
        yield _closed(stack)


def _outermost_first(event: Event) -> tuple:
    number = event.arguments.get("External id")
    return event.start_ns, -event.end_ns, number if isinstance(number, int) else 0, event.name


def _closed(stack: list[tuple[Event, int]]) -> tuple[Event, int]:
    event, inside = stack.pop()
    return event, event.duration_ns - inside
