"""Claims as labels, and the head that reads them."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch

from tiny_flux import scenes
from tiny_flux.claims import CLASSES, ClaimsHead, claims
from tiny_flux.data import training_description
from tiny_flux.scenes import Described, Description


def test_labels_of_a_description() -> None:
    description = Description("any", (Described("star", "red", "small", "top", 2), Described("cross")), "above", "gray")
    shapes, places = scenes.SHAPES, list(scenes.PLACES)
    first = [1 + shapes.index("star"), 1, 1, 1 + places.index("top"), 1]
    second = [1 + shapes.index("cross"), 0, 0, 0, 0]
    relation, background = 1 + scenes.RELATIONS.index("above"), 1 + list(scenes.BACKGROUNDS).index("gray")
    assert claims(description) == [*first, *second, *[0] * 10, relation, background]
    assert claims(None) == [0] * len(CLASSES)


def test_labels_tell_descriptions_apart_and_are_in_range() -> None:
    rng = random.Random(0)
    some = [training_description(rng) for _ in range(3000)]
    labels = [tuple(claims(d)) for d in some]
    assert all(0 <= label < classes for row in labels for label, classes in zip(row, CLASSES, strict=True))
    meanings = {(d.objects, d.relation, d.background) for d in some}
    assert len(meanings) == len({*labels})
    assert [max(column) + 1 for column in zip(*labels, strict=True)][:5] == list(CLASSES[:5])


def test_the_head_reads_claims_from_where_they_stand(fitted: Callable) -> None:
    torch.manual_seed(0)
    rng = random.Random(0)
    labels = torch.tensor([claims(training_description(rng)) for _ in range(64)])
    # One token for each claim: which one it is, and its label.
    states = torch.cat([torch.eye(len(CLASSES)).expand(64, -1, -1), torch.eye(max(CLASSES))[labels]], -1)
    head = ClaimsHead(states.shape[-1])
    first, last = fitted(head, states, labels, lr=0.03)
    assert last < 0.05 < 1 < first
