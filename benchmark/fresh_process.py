"""Run one of this repository's modules in a fresh process, with empty caches of compiled code."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import typing
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

from recipes.recipe import Recipe
from utils.errors import UsageError, UserError
from utils.files import ROOT
from utils.request import Request

_ERROR = "error: "  # how a command's last line begins when it fails


def _request(values: dict[str, Any]) -> Request:
    return Request(**{**values, "image": None if values["image"] is None else Path(values["image"])})


_FROM_JSON: dict[type, Callable[[Any], Any]] = {Path: Path, Recipe: Recipe.from_dict, Request: _request}


class Argument:
    """Mixin for a frozen dataclass that a fresh process is given: its fields are JSON's, paths, recipe and request."""

    def to_json(self) -> str:
        return json.dumps(asdict(self), default=str)  # type: ignore[call-overload]

    @classmethod
    def from_json(cls, text: str) -> Self:
        values: dict[str, Any] = json.loads(text)
        for name, hint in typing.get_type_hints(cls).items():
            for kind in (hint, *typing.get_args(hint)):
                if kind in _FROM_JSON and values[name] is not None:
                    values[name] = _FROM_JSON[kind](values[name])
        return cls(**values)


def run(name: str, module: str, argument: str, scratch: Path, debug: bool) -> None:
    """`python -m MODULE ARGUMENT`; its stderr is passed on as it comes. scratch: the folder that its caches lie in.

    name: what is run, for the error's line. debug: gives it --debug.

    Raises:
        UserError: it failed; the message is the error's line, which it printed last.
    """
    # -P: modules come from this repository, not from the working directory, to which the job's paths are relative.
    command = [sys.executable, "-P", "-m", module, argument, *(["--debug"] if debug else [])]
    environ = {
        "KINETO_LOG_LEVEL": "99",  # the profiler's library prints when it starts and stops
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        # Empty caches of compiled code: what a recipe's first user waits for.
        "TORCHINDUCTOR_CACHE_DIR": str(scratch / "inductor"),
        "TRITON_CACHE_DIR": str(scratch / "triton"),
    }
    with subprocess.Popen(command, env=environ, stderr=subprocess.PIPE) as process:
        last = _relay(process)
    if process.returncode < 0:
        ended_by = signal.Signals(-process.returncode)
        hint = " (the system's memory may have run out)" if ended_by == signal.SIGKILL else ""
        raise UserError(f"{name}: its process was ended by {ended_by.name}{hint}")
    if process.returncode != 0:
        kind = UsageError if process.returncode == UsageError.exit_code else UserError
        raise kind(last.removeprefix(_ERROR) or f"the process ended with code {process.returncode}")


def _relay(process: subprocess.Popen[bytes]) -> str:
    """Pass a process's stderr on as it comes, progress bars included, but for its error's line; its last line."""
    assert process.stderr is not None
    # newline="": a progress bar's carriage returns stay what they are.
    stream = io.TextIOWrapper(process.stderr, errors="replace", newline="")
    line = shown = last = ""
    while character := stream.read(1):
        line += character
        if not line.startswith(_ERROR[: len(line)]):
            sys.stderr.write(line[len(shown) :])
            shown = line
        if character in "\r\n":
            sys.stderr.flush()
            last = line.strip() or last
            line = shown = ""
    sys.stderr.write("\n" if shown else "")
    return line.strip() or last
