"""Prompts for timed calls: a new one each, so that nothing cached by prompt flatters a recipe."""

from __future__ import annotations

import random

from tiny_flux.captions import caption
from tiny_flux.data import training_description
from utils import checkpoints

WARM_UP = 1000  # the first number of the warm-up calls' prompts; timed calls count from 0

_SUBJECTS = (
    "A lighthouse on a cliff in a storm",
    "A bowl of ramen seen from above",
    "An old tram climbing a steep street in Lisbon",
    "A dragonfly on a reed",
    "A robot reading a newspaper on a park bench",
    "A glass greenhouse in the snow, lit from inside",
    "A chalkboard with the words 'every millisecond counts'",
    "A fox asleep in a field of lavender",
    "A tiny bakery on a street corner",
    "Two astronauts playing chess on the moon",
    "A steaming cup of coffee beside a rainy window",
    "A mountain lake at sunrise with a red canoe",
)
_STYLES = ("oil painting", "watercolor", "studio photograph", "isometric drawing", "charcoal sketch", "35 mm film")


def prompt(checkpoint: str, number: int) -> str:
    """The `number`-th prompt for a checkpoint, in words that it knows; no two numbers give the same."""
    if checkpoints.defaults(checkpoint).vocabulary == "scenes":
        rng = random.Random(number)
        return f"{caption(training_description(rng), rng)} {number}"
    subject, style = _SUBJECTS[number % len(_SUBJECTS)], _STYLES[number // len(_SUBJECTS) % len(_STYLES)]
    return f"{subject}, {style}, picture number {number}"
