"""One measurement, as the parent process hands it to a fresh one."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from recipes.recipe import Recipe
from utils.request import Request


@dataclass(frozen=True)
class Job:
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

    def to_json(self) -> str:
        return json.dumps(asdict(self), default=str)

    @classmethod
    def from_json(cls, text: str) -> Job:
        values: dict[str, Any] = json.loads(text)
        for name in ("cache_dir", "result", "image", "reference", "trace"):
            values[name] = None if values[name] is None else Path(values[name])
        recipe, request = values["recipe"], values["request"]
        request["image"] = None if request["image"] is None else Path(request["image"])
        return cls(**{**values, "recipe": Recipe.from_dict(recipe), "request": Request(**request)})
