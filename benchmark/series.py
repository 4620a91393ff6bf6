"""A series of measurements: saved as they are made, each surviving the others, within a time.

Their files are kept as results/<machine>/<name>.json, with a table of each beside it.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmark.runner import command_text
from utils import environment, results
from utils.errors import Parser, UsageError, one_line, run_command


@dataclass(frozen=True)
class Measurement:
    """`about` names what is measured; `measure()` gives its figures; `skipped` is why it can't be, if so."""

    about: dict[str, Any]
    measure: Callable[[], dict[str, Any]]
    skipped: str | None = None


def add_options(parser: argparse.ArgumentParser, seconds: float = 105) -> None:
    parser.add_argument("--output", type=Path, required=True, help="the result file, written after each measurement")
    parser.add_argument("--seconds", type=float, default=seconds, help="begin no further measurement after that long")
    parser.add_argument("--commit", help="the commit to record where no git is at hand")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")


def check(arguments: argparse.Namespace) -> torch.device:
    """The GPU.

    Raises:
        UsageError: there is none, or the output file can't be written or isn't named as one.
    """
    if not torch.cuda.is_available():
        raise UsageError("this is timed on a GPU, and there is none")
    results.check_output(arguments.output)
    return torch.device("cuda")


def main(
    name: str,
    what: str | None,
    measurements: Callable[[torch.device], Sequence[Measurement]],
    header: str,
    line: Callable[[dict[str, Any]], str],
    about: dict[str, Any] | None = None,
) -> None:
    """The command of a series without options of its own; `what` it does is its help, and the rest as `run`'s."""
    parser = Parser(description=what)
    add_options(parser)
    arguments = parser.parse_args()

    def command() -> None:
        device = check(arguments)
        run(name, measurements(device), header, line, arguments, device, about)

    run_command(command, arguments.debug)


def run(
    name: str,
    measurements: Sequence[Measurement],
    header: str,
    line: Callable[[dict[str, Any]], str],
    arguments: argparse.Namespace,
    device: torch.device,
    about: dict[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """Make the measurements, write them to `arguments.output` under `name`, and a table beside it, printed at the end.

    A row is what a measurement is about and its figures, `skipped` or `failed` with the reason; returns all of them.
    `line` is a row's text where it has figures, or its beginning where it has none. `about`: what else the file says.
    """
    begun = time.monotonic()
    machine = environment.capture(device, arguments.commit)
    rows: list[dict[str, Any]] = []
    table = header
    for measurement in measurements:
        row = dict(measurement.about)
        if measurement.skipped is not None:
            row["skipped"] = measurement.skipped
        elif time.monotonic() - begun > arguments.seconds:
            row["skipped"] = f"no time left of {arguments.seconds:.0f} s"
        else:
            try:
                row |= measurement.measure()
            except Exception as error:  # the others are worth their measurement
                row["failed"] = f"{type(error).__name__}: {one_line(error)}"
                if arguments.debug:
                    traceback.print_exc()
        rows.append(row)
        print(_text(row, line), file=sys.stderr, flush=True)
        made_with = {"environment": {**machine, "after": environment.device_state(device)}, "command": command_text()}
        results.write(arguments.output, {**(about or {}), name: rows, **made_with})
        table = "\n".join([header, *(_text(row, line) for row in rows)])
        results.write_table(arguments.output, table)
    print(table)
    return rows


def _text(row: dict[str, Any], line: Callable[[dict[str, Any]], str]) -> str:
    why = row.get("skipped") or ("failed: " + row["failed"] if "failed" in row else None)
    return line(row) if why is None else f"{line(row)}  {why}"
