#!/usr/bin/env python3
"""Time recipes, one fresh process each: `python run_benchmark.py --checkpoint tiny --ladder` for all of them."""

from __future__ import annotations

import math
import shlex
from functools import partial
from pathlib import Path

from utils.quiet import quiet

with quiet():
    import recipes
    from benchmark import report
    from benchmark.job import Job
    from benchmark.runner import Runner, command_text
    from recipes.flux_fast_flags import recipe_from_flags
    from utils import command_line, environment, results
    from utils.errors import Parser, UsageError, UserError, run_command
    from utils.files import check_folder, check_image_file, check_target


def parser() -> Parser:
    parser = Parser(description=__doc__)
    command_line.add_options(parser)
    parser.add_argument("--ladder", action="store_true", help="every rung, resumably, and the table and chart of them")
    parser.add_argument("--baseline", help="the ladder's baseline (default: the checkpoint's)")
    parser.add_argument("--rungs", nargs="+", metavar="RUNG", help="of the ladder only these, on top of all below")
    parser.add_argument("--again", action="store_true", help="measure rungs that have a result anew")
    parser.add_argument(
        "--seconds", type=float, help="begin no further rung after that long; go on with the same command"
    )
    parser.add_argument("--trace-reports", action="store_true", help="a trace's report beside each rung of the ladder")
    parser.add_argument("--runs", type=int, default=10, help="timed calls of each recipe")
    parser.add_argument("--trace-file", type=Path, help="write a profiler trace of one call after the timing")
    parser.add_argument("--trace-stacks", action="store_true", help="with Python stacks in the trace")
    parser.add_argument("--results", type=Path, default=results.RESULTS, help="folder of result files")
    parser.add_argument("--output", type=Path, help="also save the image here (without --ladder)")
    parser.add_argument("--commit", help="the commit to record where no git is at hand")
    return parser


def main() -> None:
    arguments = parser().parse_args()

    def benchmark() -> None:
        device = command_line.device(arguments)
        checkpoint = command_line.checkpoint(arguments, device)
        request = command_line.request(arguments, checkpoint)
        if arguments.runs < 1:
            raise UsageError(f"--runs {arguments.runs}: give at least 1")
        one = arguments.trace_file or arguments.output or arguments.recipe or recipe_from_flags(arguments)
        if arguments.ladder and one:
            raise UsageError("recipes, --trace-file and --output are for one recipe: leave --ladder out")
        of_ladder = ("again", "baseline", "rungs", "seconds", "trace_reports")
        given = [f"--{name.replace('_', '-')}" for name in of_ladder if getattr(arguments, name)]
        if given and not arguments.ladder:
            raise UsageError(f"{' and '.join(given)}: of the ladder only, add --ladder")
        if arguments.trace_stacks and not arguments.trace_file:
            raise UsageError("--trace-stacks needs --trace-file")
        check_target(arguments.results)
        if arguments.trace_file is not None:
            check_folder(arguments.trace_file)
        if arguments.output is not None:
            check_image_file(arguments.output)
        recipe, chosen = command_line.recipe(arguments, device)
        folder = results.folder(arguments.results, environment.capture(device), checkpoint)
        job = Job(
            checkpoint, device.type, recipe, "", None, request, arguments.runs, arguments.cache_dir,
            not arguments.use_cached_model, Path(), Path(), trace=arguments.trace_file,
            trace_stacks=arguments.trace_stacks, commit=arguments.commit, command=command_text(),
        )  # fmt: skip
        # A recipe measured alone must not replace a rung, whose ratio was formed within its ladder.
        runner = Runner(
            job, folder if arguments.ladder else folder / "alone", arguments.again, arguments.debug,
            arguments.seconds or math.inf, command_line.names(arguments.rungs), arguments.trace_reports,
        )  # fmt: skip
        if arguments.ladder:
            print(f"{checkpoint} on {device.type}: the ladder, into {folder}", flush=True)
            failed = runner.ladder(arguments.baseline or command_line.baseline(checkpoint), partial(print, flush=True))
            report.write_folder(folder)
            print(report.table(report.load(folder, results.size(vars(request)))))
            print(f"in {folder}: ladder.md, ladder.png, images.png and a file a rung")
            if failed:
                raise UserError(f"failed rungs: {', '.join(failed)}")
        else:
            print(f"{checkpoint} on {device.type}, recipe {chosen}", flush=True)
            recipes.check(recipe, device)
            result = runner.one(name := recipes.command_line_name(recipe), recipe, arguments.output)
            print(report.one_line(result))
            print(f"result: {runner.folder / results.file_name(name, vars(request))}")
            if arguments.trace_file is not None:
                print(f"trace: read it with `python -m trace_analysis report {shlex.quote(str(arguments.trace_file))}`")

    run_command(benchmark, arguments.debug)


if __name__ == "__main__":
    main()
