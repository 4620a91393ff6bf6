"""Times of the parts of a pipeline's own calls: the clock, a call that isn't decoded, a command's options."""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from benchmark import prompts
from utils import checkpoints
from utils.errors import UsageError
from utils.quiet import quiet
from utils.request import Request
from utils.timing import synchronize


@dataclass
class StepClock:
    """Milliseconds of every call of a module, such as a pipeline's transformer, with the hooks that it gets later."""

    device: torch.device
    _marks: list[tuple[Any, Any]] = field(default_factory=list)

    def attach(self, module: torch.nn.Module) -> None:
        started: list[Any] = []
        module.register_forward_pre_hook(lambda *_: started.append(self._mark()), prepend=True)
        module.register_forward_hook(lambda *_: self._marks.append((started.pop(), self._mark())))

    def milliseconds(self) -> list[float]:
        """Of the calls since they were last read."""
        synchronize(self.device)
        marks, self._marks = self._marks, []
        return [a.elapsed_time(b) if self.device.type == "cuda" else 1000 * (b - a) for a, b in marks]

    def _mark(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def latents(pipe: DiffusionPipeline, request: Request) -> torch.Tensor:
    """What the pipeline's loop ends with for `request`, not decoded."""
    with quiet():
        return pipe(**{**request.arguments(pipe), "output_type": "latent"}).images


def numbered(checkpoint: str, request: Request, number: int) -> Request:
    """The `number`-th request like this one, with a prompt and a seed of its own."""
    return replace(request, prompt=prompts.prompt(checkpoint, number), seed=number)


def add_options(parser: argparse.ArgumentParser, calls: int) -> None:
    """What both commands that time steps take; `calls`: the default of --calls."""
    add_request_options(parser)
    parser.add_argument("--calls", type=int, default=calls, help="timed calls of each recipe (default: %(default)s)")


def add_request_options(parser: argparse.ArgumentParser) -> None:
    """What `requested` takes, and where to measure it and write the figures."""
    parser.add_argument("--checkpoint", default="tiny")
    parser.add_argument("--output", type=Path, required=True, help="the figures, as JSON")
    parser.add_argument("--steps", type=int, default=8, help="denoising steps a call (default: %(default)s)")
    parser.add_argument("--height", type=int)
    parser.add_argument("--width", type=int)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--device", choices=["auto", "cuda", "cpu"], default="auto")
    parser.add_argument("--commit", help="the commit to record where no git is at hand")
    parser.add_argument("--debug", action="store_true", help="show the tracebacks of errors")


def request(arguments: argparse.Namespace) -> Request:
    """What `add_options`'s ask for, as `requested`.

    Raises:
        UsageError: as `requested` does, or --calls is below 1.
    """
    if arguments.calls < 1:
        raise UsageError(f"--calls {arguments.calls}: give at least 1")
    return requested(arguments)


def requested(arguments: argparse.Namespace) -> Request:
    """What `add_request_options`'s ask for; what isn't given is the checkpoint's default.

    Raises:
        UsageError: a value is out of range, or the checkpoint is unknown or edits images.
    """
    known = checkpoints.defaults(arguments.checkpoint)
    if known.takes_image:
        raise UsageError(
            f"{arguments.checkpoint} edits an image: use one that draws from a prompt alone, or time whole calls with "
            "run_benchmark.py --image"
        )
    return Request(
        known.prompt, arguments.height or known.height, arguments.width or known.width, arguments.steps,
        known.guidance, known.max_sequence_length, arguments.batch,
    )  # fmt: skip
