"""What a caption claims, as labels of a text encoder: a second thing to learn while training.

FLUX's text encoders come trained; these start from nothing, and the image's error alone teaches them slowly: at first
one can lower it without telling the second object of a caption from the first. Linear heads, thrown away after
training, read every claim off the encoders' outputs.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from tiny_flux.scenes import BACKGROUNDS, COLORS, PLACES, RELATIONS, SHAPES, Description

MOST_KINDS = 4  # kinds of object that a description names, at most
_SIZES = ("small", "large")
# Classes of a kind of object's shape, colour, size, place and count, then of relation and background; in each but the
# count, 0 is for what isn't claimed.
_OF_A_KIND = (1 + len(SHAPES), 1 + len(COLORS), 1 + len(_SIZES), 1 + len(PLACES), 4)
CLASSES = _OF_A_KIND * MOST_KINDS + (1 + len(RELATIONS), 1 + len(BACKGROUNDS))


def claims(description: Description | None) -> list[int]:
    """A class for each of CLASSES; the description None, of an empty caption, claims nothing."""

    def number(names: Sequence[str], name: str | None) -> int:
        return 0 if name is None else 1 + names.index(name)

    labels: list[int] = []
    for o in description.objects if description else ():
        named = ((SHAPES, o.shape), (list(COLORS), o.color), (_SIZES, o.size), (list(PLACES), o.place))
        labels += [*(number(names, name) for names, name in named), o.count - 1]
    labels += [0] * (len(_OF_A_KIND) * MOST_KINDS - len(labels))
    relation, background = (description.relation, description.background) if description else (None, None)
    return [*labels, number(RELATIONS, relation), number(list(BACKGROUNDS), background)]


class ClaimsHead(nn.Module):
    """Reads a caption's claims off a text encoder's states, each claim looking where it likes among the tokens."""

    first: torch.Tensor
    others: torch.Tensor

    def __init__(self, features: int):
        super().__init__()
        self.queries = nn.Parameter(torch.randn(len(CLASSES), features) / features**0.5)
        self.key = nn.Linear(features, features)
        self.classes = nn.Linear(features, sum(CLASSES))
        # Each claim's classes are a range of all; the others' logits don't count for it.
        first = torch.tensor([0, *itertools.accumulate(CLASSES)])[:-1]
        owner = torch.arange(len(CLASSES)).repeat_interleave(torch.tensor(CLASSES))
        others = torch.where(owner == torch.arange(len(CLASSES))[:, None], 0.0, -torch.inf)
        self.register_buffer("first", first, persistent=False)
        self.register_buffer("others", others, persistent=False)

    def loss(self, states: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Mean cross entropy; states [n, tokens, features], labels [n, len(CLASSES)] int64."""
        pooled = F.scaled_dot_product_attention(self.queries.expand(len(states), -1, -1), self.key(states), states)
        logits = self.classes(pooled).float() + self.others
        return F.cross_entropy(logits.flatten(0, 1), (labels + self.first).flatten())
