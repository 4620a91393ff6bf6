#!/usr/bin/env python3
"""One prompt, one image: `python gen_image.py --checkpoint tiny --recipe bf16 --prompt "a red triangle"`."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from utils.quiet import quiet

with quiet():
    import recipes
    from export.lora import Adapter
    from export.runtime import announce
    from recipes.dtype import torch_dtype
    from utils import checkpoints, command_line
    from utils.compile_clock import CompileClock
    from utils.errors import Parser, run_command
    from utils.files import check_image_file, replacing
    from utils.request import warn_of_cut_tokens


def parser() -> Parser:
    parser = Parser(description=__doc__)
    command_line.add_options(parser)
    output = Path("output.png")
    parser.add_argument(
        "--output", type=Path, default=output, help="the image's file; with --batch, output-1.png, ... too"
    )
    parser.add_argument(
        "--lora", metavar="PATH[:SCALE]", help="a LoRA: safetensors file, folder or hub id, and its scale (default: 1)"
    )
    parser.add_argument(
        "--build-packages",
        action="store_true",
        help="a recipe with execution=aoti: build what is missing in --cache-dir, which else is refused",
    )
    parser.add_argument("--trace-file", type=Path, help="has no effect here: run_benchmark.py writes traces")
    return parser


def output_paths(output: Path, batch: int) -> list[Path]:
    """output.png, output-1.png, output-2.png, ..."""
    return [output, *(output.with_name(f"{output.stem}-{i}{output.suffix}") for i in range(1, batch))]


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
            check_image_file(path)
        if arguments.trace_file is not None:
            print("warning: --trace-file has no effect here: run_benchmark.py writes traces", file=sys.stderr)
        recipes.check(recipe, device)
        packages = command_line.packages(arguments)
        lora = command_line.lora(arguments, checkpoint)
        pipe = checkpoints.load(checkpoint, torch_dtype(recipe), device)
        recipes.apply(pipe, recipe, packages)
        announce(pipe, request)
        if lora is not None:
            Adapter(pipe, checkpoint).load(*lora)
        warn_of_cut_tokens(pipe, request)
        checkpoints.warn_of_other_size(checkpoint, request.height, request.width)
        loaded = time.perf_counter()
        with CompileClock(progress=True) as clock:
            images = request.run(pipe)
        ended = time.perf_counter()
        for path, image in zip(paths, images, strict=True):
            with replacing(path) as temporary:
                image.save(temporary)
        drawing = ended - loaded - clock.seconds
        what = f"{request.steps} steps, {request.height}x{request.width}"
        times = f"loading {loaded - started:.1f} s, compiling {clock.seconds:.1f} s, drawing {drawing:.2f} s"
        print(f"{', '.join(map(str, paths))}: {times} ({what})")

    run_command(generate, arguments.debug)


if __name__ == "__main__":
    main()
