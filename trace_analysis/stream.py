"""A JSON file's events one after the other, without the whole file in memory, and as far as it is whole."""

from __future__ import annotations

import codecs
import json
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from tqdm import tqdm

from utils.errors import UsageError

_CHUNK = 1 << 20  # bytes read at a time
_LONGEST = 1 << 26  # characters of one event: beyond, the file is no trace
_GZIP = b"\x1f\x8b"
_SPACE = re.compile(r"[ \t\r\n]*")
_BETWEEN = re.compile(r"[ \t\r\n]*,[ \t\r\n]*")
_SLOW_S = 2.0  # the progress bar shows from here on


class TraceStream:
    """Iterating gives the values of the list `traceEvents`; when it ends, the other keys are in `properties`.

    Numbers with a point or an exponent stay text: a float holds no nanoseconds of a clock that started in 1970.
    `incomplete`: afterwards, what was wrong with a file that ends too early; None for a whole one.

    Raises:
        UsageError: the file can't be read, or isn't JSON with a list `traceEvents`, or is damaged before its first
            event.
    """

    def __init__(self, path: Path):
        self.path = path
        self.properties: dict[str, Any] = {}
        self.incomplete: str | None = None
        self._text, self._at, self._ended = "", 0, False
        self._chunks: Iterator[str] = iter(())
        self._events = 0
        self._scan: Callable[[str, int], tuple[Any, int]] = _scanner()

    def __iter__(self) -> Iterator[Any]:
        try:
            with self.path.open("rb") as file, _progress(file, self.path) as bar:
                self._chunks = _decoded(file, bar)
                yield from self._top()
        except FileNotFoundError:
            raise UsageError(f"there is no file {self.path}") from None
        except IsADirectoryError:
            raise UsageError(f"{self.path} is a folder: give the trace file in it") from None
        except RecursionError:
            raise UsageError(f"{self.path} is not a trace: its JSON is nested too deep") from None
        except OSError as error:
            raise UsageError(f"{self.path} can't be read: {error.strerror or error}") from None

    def _top(self) -> Iterator[Any]:
        """The outermost object, key by key."""
        first = self._next_character()
        if not first and self.incomplete is None:
            raise UsageError(f"{self.path} is empty: record the trace again")
        if first and first not in "{[":
            compressed = ", nor gzip" if self.path.suffix == ".gz" else ""
            raise UsageError(f"{self.path} is not JSON{compressed}: give a trace as torch.profiler writes it")
        found = False
        if first == "{":
            self._at += 1
            while (character := self._next_character()) and character != "}":
                if character == ",":
                    self._at += 1
                    continue
                key = self._value()
                if self._next_character() != ":":
                    self._stop("a key without a value")
                    break
                self._at += 1
                if key == "traceEvents" and self._next_character() == "[":
                    found = True
                    self._at += 1
                    yield from self._list()
                elif self._ended_early() or not isinstance(key, str):
                    break
                else:
                    self.properties[key] = self._value()
                if self.incomplete:
                    break
            else:
                if character != "}":
                    self._stop("it ends too early")
        if self.incomplete and not self._events:
            raise UsageError(f"{self.path} is truncated or damaged ({self.incomplete}): record the trace again")
        if not found:
            raise UsageError(
                f"{self.path} is JSON but not a trace: it has no list `traceEvents` as torch.profiler writes it"
            )

    def _list(self) -> Iterator[Any]:
        if self._next_character() == "]":
            self._at += 1
            return
        while not self._ended_early():
            value = self._value()
            if self.incomplete:
                return
            yield value
            self._events += 1
            between = _BETWEEN.match(self._text, self._at)
            if between is not None and between.end() < len(self._text):
                self._at = between.end()
                continue
            character = self._next_character()
            if character == "]":
                self._at += 1
                return
            if character != ",":
                self._stop("it ends too early" if not character else f"{character!r} after an event")
                return
            self._at += 1
            self._next_character()

    def _value(self) -> Any:
        """The JSON value here; None, and `incomplete` set, where there is no whole one."""
        if self._ended_early():
            return None
        while True:
            try:
                value, end = self._scan(self._text, self._at)
                if end < len(self._text) or not self._more():
                    self._at = end
                    return value
            except (ValueError, StopIteration) as error:
                if not _cut_off(error, len(self._text)):
                    self._stop(f"what follows is no JSON ({getattr(error, 'msg', None) or 'no value'})")
                    return None
                if len(self._text) - self._at > _LONGEST or not self._more(len(self._text) - self._at):
                    self._stop("it ends too early" if self._ended else "what follows has no end")
                    return None

    def _next_character(self) -> str:
        """The next one that isn't white space, or "" at the end; it is not passed over."""
        while True:
            self._at = _SPACE.match(self._text, self._at).end()  # type: ignore[union-attr]
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more():
                return ""

    def _ended_early(self) -> bool:
        if self.incomplete is None and not self._next_character():
            self._stop("it ends too early")
        return self.incomplete is not None

    def _more(self, at_least: int = 1) -> bool:
        """Read on, `at_least` so many characters where there are as many; False at the end of the file."""
        parts, size = [self._text[self._at :]], 0
        try:
            while size < at_least:
                parts.append(next(self._chunks))
                size += len(parts[-1])
        except StopIteration:
            self._ended = True
        except (zlib.error, EOFError) as error:
            self._ended = True
            self._stop(str(error))
        self._text, self._at = "".join(parts), 0
        return size > 0

    def _stop(self, reason: str) -> None:
        self.incomplete = self.incomplete or f"after {self._events} events: {reason}"


def _scanner() -> Callable[[str, int], tuple[Any, int]]:
    """scan(text, at): the value there and where it ends. Raises StopIteration or ValueError, and never skips space."""
    return json.JSONDecoder(parse_float=str, strict=False).scan_once  # type: ignore[attr-defined]


def _cut_off(error: ValueError | StopIteration, length: int) -> bool:
    """Whether the scan of a text of `length` characters failed at its end, so that more text could help."""
    if isinstance(error, StopIteration):
        at = error.value
    elif isinstance(error, json.JSONDecodeError):
        if error.msg.startswith("Unterminated string"):  # said of where it begins
            return True
        at = error.pos
    else:  # a number of more digits than Python takes
        return False
    return length - at < len("-Infinity")  # the longest word or escape that is nothing until it is whole


def _decoded(file: BinaryIO, bar: tqdm) -> Iterator[str]:
    """The file's text, unpacked if its first bytes say that it is gzipped. Raises EOFError, zlib.error."""
    decode = codecs.getincrementaldecoder("utf-8")("replace").decode
    data = file.read(_CHUNK)
    unpack = zlib.decompressobj(wbits=31) if data.startswith(_GZIP) else None
    while data:
        bar.update(len(data))
        if unpack is None:
            yield decode(data)
        else:
            yield from map(decode, _unpacked(unpack, data))
            while unpack.eof and unpack.unused_data.startswith(_GZIP):  # another member, as `cat a.gz b.gz` makes
                data, unpack = unpack.unused_data, zlib.decompressobj(wbits=31)
                yield from map(decode, _unpacked(unpack, data))
        data = file.read(_CHUNK)
    yield decode(b"", True)
    if unpack is not None and not unpack.eof:
        raise EOFError("its gzip stream ends too early")


def _unpacked(unpack: Any, data: bytes) -> Iterator[bytes]:
    """Piece by piece: a small file may unpack to a very large one."""
    while data:
        yield unpack.decompress(data, 4 * _CHUNK)
        data = unpack.unconsumed_tail


def _progress(file: BinaryIO, path: Path) -> tqdm:
    size = path.stat().st_size
    return tqdm(total=size, desc=f"reading {path.name}", unit="B", unit_scale=True, delay=_SLOW_S, leave=False)
