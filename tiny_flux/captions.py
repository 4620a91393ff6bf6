"""Wordings: from a `Description` to a sentence that claims just that.

A wording is a sentence template of one category. The training wordings are composed (frame x body x
background phrase); the held-out ones are written out by hand, use the same vocabulary, and can't be composed
from the training parts, which a test checks.
"""

from __future__ import annotations

import random

from tiny_flux.scenes import EXTRA_CATEGORY, Described, Description

_NUMBERS = {2: ("two", "2"), 3: ("three", "3"), 4: ("four", "4")}
_SIZES = {"small": ("small", "small", "tiny", "little"), "large": ("large", "large", "big", "huge")}

# How training sentences begin: {body} is one of the bodies below.
FRAMES = (
    "{body}",
    "{body}",
    "a picture of {body}",
    "an image of {body}",
    "a photo of {body}",
    "a drawing of {body}",
    "an image showing {body}",
    "a picture that shows {body}",
    "a simple drawing with {body}",
    "there is {body}",
    "here we see {body}",
    "draw {body}",
    "please paint {body}",
    "a scene with {body}",
    "a flat illustration of {body}",
    "the image contains {body}",
    "this is {body}",
    "this image shows {body}",
)
BACKGROUNDS = (
    "{sentence} on a {background} background",
    "{sentence} on {background}",
    "{sentence} against a {background} background",
    "{sentence} in front of a {background} backdrop",
    "{sentence}, {background} background",
    "{sentence} with a {background} background",
    "{sentence}, and the background is {background}",
    "{sentence}, all of it on {background}",
    "on a {background} background, {sentence}",
    "on {background}: {sentence}",
    "{background} background, {sentence}",
)
PAIRS = (
    "{a} and {b}",
    "{a} and {b}",
    "{a} with {b}",
    "{a} together with {b}",
    "{a} next to {b}",
    "{a}, {b}",
    "{a} plus {b}",
    "both {a} and {b}",
    "{a} and then {b}",
    "{a} and also {b}",
    "{a} and {b} next to it",
)
LISTS = ("{most} and {last}", "{most}, and {last}", "{most}, {last}", "{most} with {last}", "{most} plus {last}")
PLACES = (
    "{a} in the {place}",
    "{a} at the {place}",
    "{a} in the {place} of the image",
    "{a} at the {place} of the picture",
    "{a} placed in the {place}",
    "{a} located at the {place}",
    "in the {place}, {a}",
    "at the {place} there is {a}",
    "{a}, {place}",
)
RELATIONS = {
    "left of": (
        "{a} left of {b}",
        "{a} to the left of {b}",
        "{a} on the left of {b}",
        "{a} on the left side of {b}",
        "{a} placed left of {b}",
        "{a} that is left of {b}",
        "to the left of {b} there is {a}",
    ),
    "right of": (
        "{a} right of {b}",
        "{a} to the right of {b}",
        "{a} on the right of {b}",
        "{a} on the right side of {b}",
        "{a} placed right of {b}",
        "{a} that is right of {b}",
        "to the right of {b} there is {a}",
    ),
    "above": (
        "{a} above {b}",
        "{a} over {b}",
        "{a} placed above {b}",
        "{a} located above {b}",
        "{a} that is above {b}",
        "{a} higher than {b}",
        "above {b} there is {a}",
    ),
    "below": (
        "{a} below {b}",
        "{a} under {b}",
        "{a} placed below {b}",
        "{a} located below {b}",
        "{a} that is below {b}",
        "{a} lower than {b}",
        "below {b} there is {a}",
    ),
}

# Held-out sentences, by category: never trained on. {on} is replaced by "" where no background is claimed.
HELD_OUT = {
    "single_object": (
        "please draw a picture with {a}{on}",
        "we see {a}{on}, a simple image",
        "this photo shows {a}{on}",
        "the drawing contains {a}{on}",
        "paint an illustration that contains {a}{on}",
        "a simple scene showing {a}{on}",
    ),
    "colors": (
        "a simple photo showing {a}{on}",
        "here is {a}{on}",
        "please draw an image with {a}{on}",
        "the picture shows {a}{on}",
        "we see a drawing of {a}{on}",
        "a flat image that contains {a}{on}",
    ),
    "counting": (
        "the drawing shows {a}{on}",
        "a simple image that contains {a}{on}",
        "please draw a scene with {a}{on}",
        "here we see a picture with {a}{on}",
        "paint {a}{on}, please",
        "an illustration showing {a}{on}",
    ),
    "two_objects": (
        "please draw {a} and also {b}{on}",
        "a simple image with both {a} and {b} in it{on}",
        "the picture contains {a} together with {b}{on}",
        "here is {a}, and next to it {b}{on}",
        "paint a scene that shows {a} plus {b}{on}",
        "we see {a} and we see {b}{on}",
    ),
    "color_attribution": (
        "the drawing shows both {a} and {b}{on}",
        "here is a picture with {a} and with {b}{on}",
        "please paint an image that contains {a} and {b}{on}",
        "a photo showing {a}, together with {b}{on}",
        "we see {a} next to {b} in a simple scene{on}",
        "please draw {a}, and then draw {b}{on}",
    ),
    "position": (
        "please draw a simple picture with {a} {where}{on}",
        "the image shows {a} {where}{on}",
        "here is {a}, {where}{on}",
        "paint {a} that is {where}{on}",
        "a photo showing {a} placed {where}{on}",
        "we see {a} {where} in this drawing{on}",
    ),
}
_HELD_OUT_ON = (", all on a {background} background", " in front of a {background} background")
_HELD_OUT_PLACE = ("in the {place}", "at the {place}", "in the {place} of the picture")
_HELD_OUT_RELATION = {
    "left of": ("to the left of {b}", "left of {b}", "on the left side of {b}"),
    "right of": ("to the right of {b}", "right of {b}", "on the right side of {b}"),
    "above": ("above {b}", "over {b}", "higher than {b}"),
    "below": ("below {b}", "under {b}", "lower than {b}"),
}


def noun_phrase(described: Described, rng: random.Random) -> str:
    """ "a small red circle", "three blue stars", "a circle that is red" (one time in ten)."""
    plural = described.count > 1
    noun = described.shape + ("es" if described.shape == "cross" else "s") if plural else described.shape
    size = rng.choice(_SIZES[described.size]) if described.size else ""
    color, after = described.color or "", ""
    if color and rng.random() < 0.1:
        color, after = "", f" that {'are' if plural else 'is'} {color}"
    words = " ".join(word for word in (size, color, noun) if word) + after
    if plural:
        return f"{rng.choice(_NUMBERS[described.count])} {words}"
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def caption(description: Description, rng: random.Random) -> str:
    """A training sentence for `description`."""
    phrases = [noun_phrase(o, rng) for o in description.objects]
    if description.relation is not None:
        body = rng.choice(RELATIONS[description.relation]).format(a=phrases[0], b=phrases[1])
    elif description.objects[0].place is not None:
        body = rng.choice(PLACES).format(a=phrases[0], place=description.objects[0].place)
    elif len(phrases) == 2:
        body = rng.choice(PAIRS).format(a=phrases[0], b=phrases[1])
    elif description.category == EXTRA_CATEGORY:
        body = rng.choice(LISTS).format(most=", ".join(phrases[:-1]), last=phrases[-1])
    else:
        body = phrases[0]
    sentence = rng.choice(FRAMES).format(body=body)
    if description.background is not None:
        sentence = rng.choice(BACKGROUNDS).format(sentence=sentence, background=description.background)
    if rng.random() < 0.3:
        sentence += "."
    return sentence[0].upper() + sentence[1:] if rng.random() < 0.5 else sentence


def held_out_caption(description: Description, rng: random.Random) -> str:
    """A sentence for `description` in a wording that training never uses."""
    phrases = [noun_phrase(o, rng) for o in description.objects]
    on = rng.choice(_HELD_OUT_ON).format(background=description.background) if description.background else ""
    where = ""
    if description.relation is not None:
        where = rng.choice(_HELD_OUT_RELATION[description.relation]).format(b=phrases[1])
    elif description.objects[0].place is not None:
        where = rng.choice(_HELD_OUT_PLACE).format(place=description.objects[0].place)
    template = rng.choice(HELD_OUT[description.category])
    return template.format(a=phrases[0], b=phrases[-1], where=where, on=on)
