"""One measurement, as the parent process hands it to a fresh one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from benchmark.fresh_process import Argument
from recipes.recipe import Recipe
from utils.request import Request


@dataclass(frozen=True)
class Job(Argument):
    """`name` and `parent` are the rung's; `image` gets the request's image, `reference` is the baseline's image.

    command: what the user typed, for the record.
    """

    checkpoint: str
    device: str
    recipe: Recipe
    name: str
    parent: str | None
    request: Request
    runs: int
    cache_dir: Path | None
    build_packages: bool
    result: Path
    image: Path
    reference: Path | None = None
    trace: Path | None = None
    trace_stacks: bool = False
    commit: str | None = None
    command: str = ""
