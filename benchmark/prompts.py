"""Prompts for timed calls: a new one each, so that nothing cached by prompt flatters a recipe."""

from __future__ import annotations

_TINY = (
    "a small green star on a white background",
    "a red circle above a yellow square",
    "three blue triangles",
    "a large pink diamond on black",
    "a purple cross and an orange circle",
    "a cyan square in the top left",
    "two yellow stars on a gray background",
    "a blue circle below a green triangle",
    "an image of a big orange cross",
    "four pink squares on beige",
    "a red star next to a cyan diamond",
    "a picture of a tiny purple triangle",
)
_FLUX = (
    "A lighthouse on a cliff in a storm, oil painting",
    "A bowl of ramen seen from above, studio light",
    "An old tram climbing a steep street in Lisbon at dusk",
    "A macro photograph of a dragonfly on a reed",
    "A robot reading a newspaper on a park bench",
    "A glass greenhouse in the snow, lit from inside",
    "A chalkboard with the words 'every millisecond counts'",
    "A fox asleep in a field of lavender, watercolor",
    "An isometric drawing of a tiny bakery",
    "Two astronauts playing chess on the moon",
    "A steaming cup of coffee beside a rainy window",
    "A mountain lake at sunrise with a red canoe",
)


def prompt(checkpoint: str, number: int) -> str:
    """The `number`-th prompt for a checkpoint, in words that it knows."""
    prompts = _TINY if checkpoint == "tiny" else _FLUX
    return prompts[number % len(prompts)]
