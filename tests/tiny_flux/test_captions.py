"""Captions claim all of a description and nothing else, and training never uses a held-out wording."""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Callable

import pytest

from tiny_flux import captions, scenes
from tiny_flux.captions import caption, held_out_caption
from tiny_flux.scenes import Described, Description

_COLOR = "|".join(scenes.COLORS)
_NUMBERS = {"a": 1, "an": 1, "two": 2, "2": 2, "three": 3, "3": 3, "four": 4, "4": 4}
_SIZES = {"small": "small", "tiny": "small", "little": "small", "large": "large", "big": "large", "huge": "large"}
NOUN_PHRASE = re.compile(
    rf"\b(?P<number>{'|'.join(sorted(_NUMBERS, key=len, reverse=True))}) (?:(?P<size>{'|'.join(_SIZES)}) )?"
    rf"(?:(?P<color>{_COLOR}) )?(?P<shape>{'|'.join(scenes.SHAPES)})(?P<plural>s|es)?"
    rf"(?: that (?P<verb>is|are) (?P<after>{_COLOR}))?\b"
)
# Longer names first, so that "top left" isn't read as "top".
PLACE = re.compile(rf"\b(?:{'|'.join(sorted(scenes.PLACES, key=len, reverse=True))})\b")
BACKGROUND = re.compile(rf"\b(?:{'|'.join(scenes.BACKGROUNDS)})\b")
SAYS = {
    "left of": r"left of|left side of",
    "right of": r"right of|right side of",
    "above": r"above|over|higher than",
    "below": r"below|under|lower than",
}
WRITERS = [caption, held_out_caption]


def normalized(text: str) -> str:
    """Lower case, without punctuation."""
    return " ".join(re.sub(r"[.,:]", " ", text.lower()).split())


def skeleton(text: str) -> str:
    """What is left of a wording when objects and backgrounds are taken out, in normalized form."""
    return BACKGROUND.sub("BACKGROUND", NOUN_PHRASE.sub("OBJECT", normalized(text)))


def training_skeletons() -> set[str]:
    """Of every sentence that the training templates can make."""
    a = "a circle"
    bodies = [a, *(t.format(a=a, b=a) for t in captions.PAIRS)]
    bodies += [t.format(most=", ".join([a] * n), last=a) for t in captions.LISTS for n in (2, 3)]
    bodies += [t.format(a=a, place=place) for t in captions.PLACES for place in scenes.PLACES]
    bodies += [t.format(a=a, b=a) for templates in captions.RELATIONS.values() for t in templates]
    on = ("{sentence}", *captions.BACKGROUNDS)
    sentences = itertools.product(captions.FRAMES, on, bodies)
    return {skeleton(o.format(sentence=f.format(body=b), background="white")) for f, o, b in sentences}


def held_out_skeletons() -> set[str]:
    a = "a circle"
    wheres = [t.format(place=place) for t in captions._HELD_OUT_PLACE for place in scenes.PLACES]
    wheres += [t.format(b=a) for templates in captions._HELD_OUT_RELATION.values() for t in templates]
    ons = ["", *(t.format(background="white") for t in captions._HELD_OUT_ON)]
    templates = itertools.chain.from_iterable(captions.HELD_OUT.values())
    return {skeleton(t.format(a=a, b=a, where=w, on=on)) for t, w, on in itertools.product(templates, wheres, ons)}


def descriptions(count: int, categories: tuple[str, ...] = scenes.CATEGORIES) -> list[Description]:
    rng = random.Random(f"captions {count}")
    return [scenes.sample_description(rng, categories[i % len(categories)]) for i in range(count)]


def read(text: str) -> list[tuple]:
    """(count, size, colour, shape) of each object that a sentence names."""
    return [
        (_NUMBERS[m["number"]], _SIZES.get(m["size"]), m["color"] or m["after"], m["shape"])
        for m in NOUN_PHRASE.finditer(text)
    ]


def attributes(described: Described) -> tuple:
    return described.count, described.size, described.color, described.shape


@pytest.mark.parametrize("write", WRITERS)
def test_every_claim_is_worded_and_no_other(write: Callable[[Description, random.Random], str]) -> None:
    rng = random.Random(6)
    categories = (*scenes.CATEGORIES, scenes.EXTRA_CATEGORY) if write is caption else scenes.CATEGORIES
    for description in descriptions(3000, categories):
        original = write(description, rng)
        text = original.lower()
        assert sorted(read(text), key=str) == sorted(map(attributes, description.objects), key=str), original
        assert BACKGROUND.findall(text) == [description.background] * (description.background is not None), original
        if description.relation is None:
            places = PLACE.findall(text)
            assert places == [description.objects[0].place] * (description.objects[0].place is not None), original
        for relation, words in SAYS.items():
            # The second object stands right behind the words; "right of the image" is a place.
            said = (NOUN_PHRASE.match(text, match.end()) for match in re.finditer(rf"\b(?:{words}) ", text))
            seconds = [read(second[0])[0] for second in said if second is not None]
            wanted = [attributes(description.objects[1])] if relation == description.relation else []
            assert seconds == wanted, original


@pytest.mark.parametrize("write", WRITERS)
def test_grammar(write: Callable[[Description, random.Random], str]) -> None:
    rng = random.Random(7)
    seen = set()
    for description in descriptions(3000):
        text = write(description, rng)
        for article, word in re.findall(r"\b(an?) (\w+)", text.lower()):
            assert article == ("an" if word[0] in "aeiou" else "a"), text
            seen.add(article)
        for phrase in NOUN_PHRASE.finditer(text.lower()):
            plural = {"cross": "es"}.get(phrase["shape"], "s") if _NUMBERS[phrase["number"]] > 1 else None
            assert phrase["plural"] == plural, text
            assert phrase["verb"] in (None, "are" if plural else "is"), text
        assert "{" not in text
        assert "  " not in text
        assert text == text.strip()
    assert seen == {"a", "an"}


def test_training_captions_are_all_of_the_known_wordings() -> None:
    # So the set of skeletons, which the next test relies on, leaves none out.
    known, rng = training_skeletons(), random.Random(8)
    used = {skeleton(caption(d, rng)) for d in descriptions(40_000, (*scenes.CATEGORIES, scenes.EXTRA_CATEGORY))}
    assert used <= known
    assert len(used) > 5000


def test_no_held_out_wording_can_be_composed_from_the_training_templates() -> None:
    training, held_out = training_skeletons(), held_out_skeletons()
    assert len(held_out) > 500
    assert not training & held_out
    rng = random.Random(9)
    used = {skeleton(held_out_caption(d, rng)) for d in descriptions(5000)}
    assert used <= held_out


def test_held_out_wordings_use_no_word_that_training_lacks() -> None:
    def words(skeletons: set[str]) -> set[str]:
        return set(" ".join(skeletons).split())

    assert words(held_out_skeletons()) <= words(training_skeletons())


def test_captions_are_the_same_for_the_same_generator() -> None:
    some = descriptions(200)
    for write in WRITERS:
        first, second = ([write(d, rng) for d in some] for rng in (random.Random(3), random.Random(3)))
        assert first == second
        assert len(set(first)) > 150
