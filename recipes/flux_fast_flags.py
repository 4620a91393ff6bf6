"""huggingface/flux-fast's command-line flags, mapped to ours, so that its published commands run unchanged."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from recipes.ladder import named
from recipes.recipe import Recipe, default

# Flag of flux-fast -> our option's destination and type, for those that take a value.
_RENAMED = {"--ckpt": ("checkpoint", str), "--num_inference_steps": ("steps", int), "--output-file": ("output", Path)}
# Flag -> the recipe's field that it puts back to its default.
_DISABLE = {
    "--disable_bf16": "dtype",
    "--disable_fused_projections": "fused_qkv",
    "--disable_channels_last": "channels_last",
    "--disable_fa3": "attention",
    "--disable_quant": "quantization",
    "--disable_inductor_tuning_flags": "inductor_flags",
    "--disable_cache_dit": "cache",
}
_MODES = {"compile": "compile", "export_aoti": "aoti", "disabled": "eager"}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add them as a group of their own; none has a default, so that only given ones count."""
    group = parser.add_argument_group(
        "flags of huggingface/flux-fast",
        "Any of --compile_export_mode and --disable_* starts from flux-fast's own recipe, which has everything on.",
    )
    for flag, (destination, kind) in _RENAMED.items():
        group.add_argument(
            flag, dest=destination, type=kind, default=argparse.SUPPRESS, help=f"same as --{destination}"
        )
    group.add_argument("--compile_export_mode", choices=_MODES, help="execution: compile, aoti or eager")
    for flag, field in _DISABLE.items():
        group.add_argument(flag, action="store_true", help=f"recipe: {field}={_text(default(field))}")


def recipe_from_flags(arguments: argparse.Namespace) -> Recipe | None:
    """The recipe that flux-fast would run for these flags; None where none was given."""
    off = [field for flag, field in _DISABLE.items() if getattr(arguments, flag.removeprefix("--"))]
    mode = arguments.compile_export_mode
    if mode is None and not off:
        return None
    recipe = replace(named()["inductor_flags"], max_autotune=True, execution="aoti", compile_scope="whole")
    for field in off:
        recipe = recipe.without(field)
    execution: Any = _MODES[mode or "export_aoti"]
    return recipe.without("execution") if execution == "eager" else replace(recipe, execution=execution)


def _text(value: object) -> str:
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    return value if isinstance(value, str) else "torch's defaults"
