"""Command line: `python -m trace_analysis report trace.json.gz` and `... diff before.json.gz after.json.gz`."""

from __future__ import annotations

import sys
from pathlib import Path

from trace_analysis import markdown, page, tables
from trace_analysis.diff import diff
from trace_analysis.load import load
from trace_analysis.report import Analysis
from trace_analysis.steps import DENOISING_STEP
from utils.errors import Parser, run_command
from utils.files import check_folder, write_text


def parser() -> Parser:
    parser = Parser(prog="python -m trace_analysis", description="Where the time of a profiler trace goes.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    one = commands.add_parser("report", help="one trace: steps, kernels, synchronisations, gaps, rates")
    one.add_argument("trace", type=Path, help="a trace of torch.profiler, as run_benchmark.py --trace-file writes it")
    one.add_argument("--shapes-from", type=Path, help="a trace without CUDA graphs: shapes of the graphs' kernels")
    one.add_argument("--html", type=Path, help="also write a page with a timeline and charts to this file")
    two = commands.add_parser("diff", help="two traces: what the change in one denoising step is made of")
    two.add_argument("before", type=Path)
    two.add_argument("after", type=Path)
    for command in (one, two):
        command.add_argument("--step-marker", default=DENOISING_STEP, help="range around a step (default: %(default)s)")
        command.add_argument("--json", action="store_true", help="print JSON, times in nanoseconds, and not Markdown")
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def main() -> None:
    arguments = parser().parse_args()

    def analysis(path: Path, shapes_from: Analysis | None = None) -> Analysis:
        return Analysis(load(path), arguments.step_marker, shapes_from)

    def run_report() -> None:
        if arguments.html is not None:
            check_folder(arguments.html)
        shapes_from = analysis(arguments.shapes_from) if arguments.shapes_from else None
        found = analysis(arguments.trace, shapes_from)
        if arguments.html is not None:
            write_text(arguments.html, page.page(found))
            print(f"page: {arguments.html}", file=sys.stderr)
        title = tables.printable(found.report.trace)
        print(
            found.report.to_json() if arguments.json else markdown.document(title, tables.report_tables(found.report))
        )

    def run_diff() -> None:
        found = diff(analysis(arguments.before), analysis(arguments.after))
        title = f"{tables.printable(found.before)} to {tables.printable(found.after)}"
        print(found.to_json() if arguments.json else markdown.document(title, tables.diff_tables(found)))

    run_command(run_report if arguments.command == "report" else run_diff, arguments.debug)


if __name__ == "__main__":
    main()
