"""A Chrome trace as torch.profiler (Kineto) writes it, from its file to `Event`s."""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.errors import UsageError

_GZIP = b"\x1f\x8b"
_MICROSECONDS = re.compile(r"(\d{1,17})(?:\.(\d+))?")


@dataclass(frozen=True, slots=True)
class Event:
    """One event with a duration. Times are integer nanoseconds, on the trace's own clock.

    category: Kineto's: cpu_op, user_annotation, cuda_runtime, kernel, gpu_memcpy, python_function, ...
    process, thread: numbers on the host; on a GPU the device and the stream.
    arguments: what else Kineto says: "External id", "correlation", "Input Dims", ...
    """

    category: str
    name: str
    start_ns: int
    duration_ns: int
    process: int | str
    thread: int | str
    arguments: dict[str, Any]

    @property
    def end_ns(self) -> int:
        return self.start_ns + self.duration_ns


@dataclass(frozen=True)
class Trace:
    """The events of one trace, in the file's order, which means nothing."""

    path: Path
    events: tuple[Event, ...]

    def of(self, categories: Collection[str]) -> Iterator[Event]:
        return (event for event in self.events if event.category in categories)

    @property
    def has_gpu(self) -> bool:
        return any(True for _ in self.of({"kernel"}))


def load(path: Path) -> Trace:
    """Read a trace, gzipped or plain; its first bytes decide which, not its name.

    Raises:
        UsageError: it can't be read, or isn't a whole Chrome trace, or holds no events with a duration.
    """
    found = _parse(path, _read(path))
    rows = found.get("traceEvents") if isinstance(found, dict) else None
    if not isinstance(rows, list):
        raise UsageError(f"{path} is JSON but not a trace: it has no list `traceEvents` as torch.profiler writes it")
    events = []
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise UsageError(f"{path} is not a trace: its event {number} is not an object")
        if row.get("ph") == "X":  # complete events; the others name threads, draw arrows and mark moments
            try:
                events.append(_event(row))
            except ValueError as error:
                raise UsageError(f"{path} is not a trace of torch.profiler: its event {number} has {error}") from None
    if not events:
        raise UsageError(f"{path} holds no events: was anything run while the profiler was on?")
    return Trace(path, tuple(events))


def _read(path: Path) -> str:
    try:
        data = path.read_bytes()
        if data.startswith(_GZIP):
            data = gzip.decompress(data)
    except FileNotFoundError:
        raise UsageError(f"there is no file {path}") from None
    except IsADirectoryError:
        raise UsageError(f"{path} is a folder: give the trace file in it") from None
    except EOFError:
        raise UsageError(f"{path} is truncated: its gzip stream ends too early; record the trace again") from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise UsageError(f"{path} is damaged: {error}; record the trace again") from None
    except OSError as error:
        raise UsageError(f"{path} can't be read: {error.strerror or error}") from None
    return data.decode(errors="replace")


def _parse(path: Path, text: str) -> Any:
    if not text.strip():
        raise UsageError(f"{path} is empty: record the trace again")
    try:
        # Times stay text until they are integers: a float holds no nanoseconds of a clock that started in 1970.
        return json.loads(text, parse_float=str)
    except RecursionError:
        raise UsageError(f"{path} is not a trace: its JSON is nested too deep") from None
    except ValueError as error:  # what JSONDecodeError is, and an integer of thousands of digits
        where = f"at character {error.pos} of {len(text)}" if isinstance(error, json.JSONDecodeError) else str(error)
        kind = "truncated or damaged" if text.lstrip()[0] in "{[" else "not"
        compressed = ", nor gzip" if path.suffix == ".gz" and kind == "not" else ""
        raise UsageError(f"{path} is {kind} JSON{compressed} ({where}): record the trace again") from None


def _event(row: dict[str, Any]) -> Event:
    """One event of the file. Raises ValueError with what is wrong about it."""
    name, category = row.get("name"), row.get("cat", "")
    process, thread, arguments = row.get("pid", 0), row.get("tid", 0), row.get("args", {})
    if not isinstance(name, str) or not isinstance(category, str):
        raise ValueError("no name")
    if not isinstance(process, int | str) or not isinstance(thread, int | str):
        raise ValueError("no process or thread")
    if not isinstance(arguments, dict):
        raise ValueError("arguments that are no object")
    return Event(
        category, name, _nanoseconds(row, "ts"), _nanoseconds(row, "dur"), process, thread, arguments
    )  # fmt: skip


def _nanoseconds(row: dict[str, Any], key: str) -> int:
    """The time under `key`, in microseconds in the file, exactly; digits beyond the nanosecond are cut."""
    text = str(row.get(key))
    plain = _MICROSECONDS.fullmatch(text)
    if plain is not None:
        return int(plain[1]) * 1000 + int((plain[2] or "").ljust(3, "0")[:3])
    try:
        number = float(text)  # with an exponent, or wrong
    except ValueError:
        raise ValueError(f"no time `{key}`") from None
    if not 0 <= number < 1e17:  # false for NaN, too
        raise ValueError(f"a time `{key}` out of range")
    return round(number * 1000)
