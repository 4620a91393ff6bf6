"""Command line: `python -m trace_analysis report trace.json.gz`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NoReturn

from trace_analysis.load import load
from trace_analysis.report import report
from utils.errors import run_command


class Parser(argparse.ArgumentParser):
    """Errors in one line, exit code 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} (--help shows the options)\n")


def parser() -> Parser:
    parser = Parser(prog="python -m trace_analysis", description="Where the time of a profiler trace goes.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    one = commands.add_parser("report", help="one trace: its ranges, and the longest operators or kernels")
    one.add_argument("trace", type=Path, help="a trace of torch.profiler, as run_benchmark.py --trace-file writes it")
    one.add_argument("--json", action="store_true", help="print JSON, times in nanoseconds")
    one.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def main() -> None:
    arguments = parser().parse_args()

    def run() -> None:
        found = report(load(arguments.trace))
        print(found.to_json() if arguments.json else found.to_text())

    run_command(run, arguments.debug)


if __name__ == "__main__":
    main()
