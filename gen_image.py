#!/usr/bin/env python3
"""One prompt, one image: `python gen_image.py --checkpoint tiny --prompt "a red circle left of a blue square"`."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from utils.quiet import quiet

with quiet():
    import recipes
    from export.package import PackageStore
    from recipes.dtype import torch_dtype
    from utils import checkpoints, command_line
    from utils.compile_clock import CompileClock
    from utils.errors import run_command
    from utils.files import check_folder, replacing
    from utils.request import warn_of_cut_tokens


def parser() -> command_line.Parser:
    parser = command_line.Parser(description=__doc__)
    command_line.add_options(parser)
    parser.add_argument("--output", default="output.png", help="the image's file; with --batch, numbered from the second on")
    return parser


def output_paths(output: str, batch: int) -> list[Path]:
    """output.png, output-1.png, output-2.png, ..."""
    first = Path(output)
    return [first, *(first.with_name(f"{first.stem}-{i}{first.suffix}") for i in range(1, batch))]


def main() -> None:
    arguments = parser().parse_args()

    def generate() -> None:
        started = time.perf_counter()
        device = command_line.device(arguments)
        checkpoint = command_line.checkpoint(arguments, device)
        recipe, chosen = command_line.recipe(arguments, device)
        print(f"{checkpoint} on {device.type}, recipe {chosen}", flush=True)
        request = command_line.request(arguments, checkpoint)
        paths = output_paths(arguments.output, request.batch)
        for path in paths:
            check_folder(path)
        recipes.check(recipe, device)
        pipe = checkpoints.load(checkpoint, torch_dtype(recipe), device)
        recipes.apply(pipe, recipe, PackageStore(arguments.cache_dir, build=not arguments.use_cached_model))
        warn_of_cut_tokens(pipe, request)
        loaded = time.perf_counter()
        with CompileClock(progress=True) as clock:
            images = request.run(pipe)
        ended = time.perf_counter()
        for path, image in zip(paths, images, strict=True):
            with replacing(path) as temporary:
                image.save(temporary)
        drawing = ended - loaded - clock.seconds
        print(f"{', '.join(map(str, paths))}: loading {loaded - started:.1f} s, compiling {clock.seconds:.1f} s, ", end="")
        print(f"drawing {drawing:.2f} s ({request.steps} steps, {request.width}x{request.height})")

    run_command(generate, arguments.debug)


if __name__ == "__main__":
    sys.exit(main())
