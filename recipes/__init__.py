"""Recipes: what to optimize and how. `apply(pipe, recipe)` puts one into effect on a diffusers Flux pipeline."""

from recipes.apply import applied, apply, check, fastest, is_lossless, nearest, not_timed, refusal, saving_memory
from recipes.ladder import LADDER, Rung, climb, command_line_name, named, parse
from recipes.recipe import FirstBlockCache, InductorFlags, Recipe, RecipeError, StepSkipping

__all__ = [
    "LADDER",
    "FirstBlockCache",
    "InductorFlags",
    "Recipe",
    "RecipeError",
    "Rung",
    "StepSkipping",
    "applied",
    "apply",
    "check",
    "climb",
    "command_line_name",
    "fastest",
    "is_lossless",
    "named",
    "nearest",
    "not_timed",
    "parse",
    "refusal",
    "saving_memory",
]
