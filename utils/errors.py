"""Errors a user can act on, and how a command ends on them: one line, exit code 2 (usage) or 1 (failure)."""

from __future__ import annotations

import argparse
import difflib
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from tqdm import tqdm

_IN_WORDS = re.compile(
    r"DefaultCPUAllocator|_STATUS_ALLOC_FAILED|CUDA out of memory"
    r"|(CUDA error|CUDA driver error|Triton Error \[CUDA\]): out of memory"
)
_BY_CALL = "API call failed"  # all that code compiled ahead of time says of an error


class UserError(Exception):
    """Something failed; the message says what, and what to do about it."""

    exit_code = 1


class UsageError(UserError):
    """What was asked for is wrong or can't be had here."""

    exit_code = 2


class OutOfMemoryError(UserError):
    """Memory ran out; the message has the peak, where the device knows it, and what would lower it."""


class Parser(argparse.ArgumentParser):
    """Its errors are one line, with exit code 2."""

    def error(self, message: str) -> NoReturn:
        unknown = re.match(r"unrecognized arguments: (--[^ =]+)", message)
        close = difflib.get_close_matches(unknown[1], self._option_string_actions, n=1) if unknown else []
        hint = f": did you mean {close[0]}?" if close else ""
        self.exit(2, f"error: {message}{hint} (--help shows the options)\n")


def one_line(error: BaseException) -> str:
    """An exception's first line that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def run_command(main: Callable[[], None], debug: bool) -> None:
    """Run a command's body; print what it raises as one line on stderr, after its traceback if `debug`.

    Raises:
        SystemExit: with 2 after a UsageError, 130 after Ctrl-C, 1 after any other error.
    """
    try:
        with warnings.catch_warnings():
            if not debug:
                warnings.simplefilter("ignore")  # libraries' own, which a user can do nothing about
            main()
    except KeyboardInterrupt:
        _fail("interrupted; nothing half-written was left behind", 130)
    except Exception as error:
        if debug:
            traceback.print_exc()
        if isinstance(error, UserError):
            _fail(str(error), error.exit_code)
        if is_out_of_memory(error):
            _fail(f"out of memory{_peak()}{'' if debug else ' (--debug shows where)'}", 1)
        hint = "" if debug else " (--debug shows the traceback)"
        _fail(f"{type(error).__name__}: {one_line(error)}{hint}", 1)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, by its class or in words: PyTorch has no class of its own for a CPU
    allocation that fails, and none for one that CUDA's libraries make. It is asked only where it was imported."""
    torch = sys.modules.get("torch")
    on_device = torch is not None and isinstance(error, torch.OutOfMemoryError)
    return on_device or isinstance(error, (MemoryError, OutOfMemoryError)) or _IN_WORDS.search(str(error)) is not None


def ran_out_of_memory(error: BaseException, refused_before: int) -> bool:
    """Whether memory ran out, also where `error` only tells which of its calls failed, as of a package.

    refused_before: `refused()` before what failed began.
    """
    return is_out_of_memory(error) or (_BY_CALL in str(error) and refused() > refused_before)


def refused() -> int:
    """How many allocations PyTorch had to refuse on the current GPU since the process began."""
    torch = _torch_on_gpu()
    return 0 if torch is None else torch.cuda.memory_stats_as_nested_dict().get("num_ooms", 0)


@contextmanager
def advising(moment: str, advice: Callable[[], str]) -> Iterator[None]:
    """Where memory runs out in the body, say so with the peak, the moment ("while loading") and `advice()`.

    Raises:
        OutOfMemoryError: memory ran out. What other bodies inside this one said of it stays.
    """
    before = refused()
    try:
        yield
    except Exception as error:
        if isinstance(error, OutOfMemoryError) or not ran_out_of_memory(error, before):
            raise
        raise OutOfMemoryError(f"out of memory {moment}{_peak()}: {advice()}") from error


def _torch_on_gpu() -> Any:
    """PyTorch, where it was imported and has used a GPU; else None."""
    torch = sys.modules.get("torch")
    return torch if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized() else None


def _peak() -> str:
    """What PyTorch held of the GPU at most, in parentheses; nothing where there is none."""
    torch = _torch_on_gpu()
    if torch is None:
        return ""
    return f" (peak {torch.cuda.max_memory_reserved() / 2**30:.1f} GiB on {torch.cuda.get_device_name()})"


def _fail(message: str, code: int) -> None:
    tqdm.write(f"error: {message}", file=sys.stderr)  # on a line of its own below an unfinished bar
    raise SystemExit(code) from None
