"""Result files, schema 1: results/<machine>/<checkpoint>/<recipe>@<height>x<width>-b<batch>-s<steps>.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from utils.environment import machine_slug
from utils.errors import UsageError, UserError
from utils.files import ROOT, check_folder, write_text

SCHEMA = 1
RESULTS = ROOT / "results"
_ALWAYS = ("recipe", "checkpoint", "request", "environment", "command")
_MEASURED = (
    "applied",
    "latency_s",
    "stages_ms",
    "denoise_step_ms",
    "ratio_to_baseline",
    "compile_s",
    "start_s",
    "warmup_calls",
    "peak_memory_bytes",
    "image_difference",
    "started_at",
)


def folder(root: Path, environment: dict[str, Any], checkpoint: str) -> Path:
    """Where a checkpoint's results on a machine lie: `tiny`, `random-flux-dev`, `flux.1-dev`; of a folder, its name."""
    path = Path(checkpoint)
    name = path.resolve().name if path.is_dir() else checkpoint.removeprefix("black-forest-labs/")
    return root / machine_slug(environment) / name.replace("/", "-").lower()


def size(request: dict[str, Any]) -> str:
    """What results of one table have in common: `1024x1024-b1-s28`, height x width, batch and steps."""
    return f"{request['height']}x{request['width']}-b{request['batch']}-s{request['steps']}"


def file_name(recipe: str, request: dict[str, Any]) -> str:
    safe = recipe.translate(str.maketrans("/:", "-=", '"{}'))
    return f"{safe}@{size(request)}.json"


def check_output(path: Path) -> None:
    """Raise UsageError unless a result file `path` could be written, and its table beside it.

    Raises:
        UsageError: as `check_folder`, or its name doesn't end in .json.
    """
    check_folder(path)
    if path.suffix != ".json":
        raise UsageError(f"--output {path}: give a name that ends in .json; a table of it is written beside it")


def write_table(path: Path, table: str) -> None:
    """The table of the result file `path`, beside it: NAME.md if it is Markdown, else NAME.txt."""
    markdown = any(line.startswith("|") for line in table.splitlines())
    write_text(path.with_suffix(".md" if markdown else ".txt"), table + "\n")


def write(path: Path, result: dict[str, Any]) -> None:
    """Whole or not at all; a result's keys keep their order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps({"schema": SCHEMA, **result}, indent=1) + "\n")


def read(path: Path) -> dict[str, Any]:
    """A result file.

    Raises:
        UserError: it isn't one of schema 1.
    """
    try:
        result = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} can't be read as a result ({error}): delete it and run again") from None
    if not isinstance(result, dict) or result.get("schema") != SCHEMA:
        raise UserError(f"{path} is not a result of schema {SCHEMA}: move it out of the results folder")
    missing = [key for key in (*_ALWAYS, *(() if "skipped" in result else _MEASURED)) if key not in result]
    if missing:
        raise UserError(f"{path} lacks {', '.join(missing)}: delete it and run again")
    return result


def files(folder: Path) -> list[Path]:
    """A folder's result files in order, by their names; not what a killed run left beside them, nor other JSON."""
    return sorted(path for path in folder.glob("*@*.json") if not path.name.startswith("."))
