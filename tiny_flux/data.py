"""The training pool: described scenes as tensors, each with a few captions already tokenized."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer
from tqdm import tqdm
from transformers import CLIPTokenizer, T5Tokenizer

from tiny_flux.captions import caption
from tiny_flux.claims import claims
from tiny_flux.layout import layout
from tiny_flux.scenes import (
    BACKGROUNDS,
    CATEGORIES,
    COLORS,
    EXTRA_CATEGORY,
    SHAPES,
    Description,
    draw,
    is_held_out,
    realize,
    sample_description,
)
from tiny_flux.tokenizers import CLIP_LENGTH, T5_LENGTH
from utils.errors import UsageError

MOST_THINGS = 4
# How often each category is trained on; what is harder to learn comes more often.
_WEIGHTS = {
    "single_object": 0.06,
    "colors": 0.08,
    "counting": 0.18,
    "two_objects": 0.12,
    "color_attribution": 0.16,
    "position": 0.20,
    EXTRA_CATEGORY: 0.20,
}


def training_description(rng: random.Random) -> Description:
    """A random description whose combination of objects isn't held out.

    In place of one that is, an object gets another colour, so that each shape is often seen beside every other.
    """
    (category,) = rng.choices([*CATEGORIES, EXTRA_CATEGORY], [_WEIGHTS[c] for c in (*CATEGORIES, EXTRA_CATEGORY)])
    description = sample_description(rng, category)
    while is_held_out(description):
        objects = list(description.objects)
        changed = rng.randrange(len(objects))
        color = rng.choice([color for color in COLORS if all(color != o.color for o in objects)])
        objects[changed] = replace(objects[changed], color=color)
        description = replace(description, objects=tuple(objects))
    return description


def told_where(description: Description) -> Description:
    """What a scene is drawn from: of two objects that only their shapes tell apart the first stands left of the second.

    With nothing to say which of two places is whose, the model draws one of the shapes at both.
    """
    by_shape = len(description.objects) == 2 and all(o.count == 1 and o.color is None for o in description.objects)
    return replace(description, relation="left of") if by_shape and description.relation is None else description


def corpus(seed: int, sentences: int = 50_000) -> list[str]:
    """Training captions to build the tokenizers from."""
    rng = random.Random(f"corpus {seed}")
    return [caption(training_description(rng), rng) for _ in range(sentences)]


class Captions(NamedTuple):
    """T5 ids [n, 64], CLIP ids [n, 77] and what they claim [n, 22] (`tiny_flux.claims`), all int64."""

    t5_ids: torch.Tensor
    clip_ids: torch.Tensor
    claims: torch.Tensor

    def at(self, rows: torch.Tensor) -> Captions:
        """Those at these rows, int64 indices or a bool for each."""
        return Captions(*(tensor[rows] for tensor in self))


@dataclass
class Pool:
    """`n` scenes with `k` captions each.

    background [n], shape and color [n, 4] int8 indices into BACKGROUNDS, SHAPES and COLORS; geometry [n, 4, 3] as
    (x, y, radius) in pixels, radius 0 where there is no object; descriptions: what the captions claim, and claims
    [n, 22] int8 the same as `tiny_flux.claims` numbers it;
    t5_ids [n, k, 64] and clip_ids [n, k, 77] int16, and told_t5_ids and told_clip_ids the same for captions that also
    say what `told_where` adds; empty_t5 [64] and empty_clip [77] int16: the empty caption.
    """

    background: torch.Tensor
    geometry: torch.Tensor
    shape: torch.Tensor
    color: torch.Tensor
    t5_ids: torch.Tensor
    clip_ids: torch.Tensor
    told_t5_ids: torch.Tensor
    told_clip_ids: torch.Tensor
    empty_t5: torch.Tensor
    empty_clip: torch.Tensor
    claims: torch.Tensor
    descriptions: list[Description]

    def __len__(self) -> int:
        return len(self.background)

    def to(self, device: torch.device | str) -> Pool:
        moved = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        return Pool(**{**vars(self), **moved})

    def of_categories(self, categories: Sequence[str]) -> torch.Tensor:
        """Which of the scenes are described in one of these categories: indices, int64.

        Raises:
            UsageError: none is, or there is no such category.
        """
        known = (*CATEGORIES, EXTRA_CATEGORY)
        if unknown := [category for category in categories if category not in known]:
            raise UsageError(f"there is no category {unknown[0]!r}: there are {', '.join(known)}")
        of_them = [i for i, description in enumerate(self.descriptions) if description.category in categories]
        if not of_them and categories:
            raise UsageError(f"no scene is of {' or '.join(categories)}: give a larger --pool")
        return torch.tensor(of_them, dtype=torch.long, device=self.background.device)

    def with_radius_below(self, radius: float) -> torch.Tensor:
        """Which of the scenes show an object of a smaller radius, in pixels: indices, int64; all if none does."""
        of_them = ((self.geometry[..., 2] > 0) & (self.geometry[..., 2] < radius)).any(1)
        return (of_them if of_them.any() else ~of_them).nonzero()[:, 0]

    def images(self, index: torch.Tensor) -> torch.Tensor:
        """float32 [len(index), 3, 256, 256] in [-1, 1]."""
        background, color = (
            torch.tensor(list(palette.values()), dtype=torch.float32, device=index.device)[of[index].long()]
            for palette, of in ((BACKGROUNDS, self.background), (COLORS, self.color))
        )
        return draw(background, self.geometry[index], self.shape[index].long(), color) * 2 - 1

    def layout(self, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What each image token shows: `tiny_flux.layout.layout`."""
        return layout(self.background[index], self.geometry[index], self.shape[index], self.color[index])

    def captions(self, index: torch.Tensor, generator: torch.Generator, empty: float = 0.0) -> Captions:
        """One caption each, drawn at random, or with probability `empty` the empty one."""
        which = self._which(index, generator)
        drop = torch.rand(len(index), 1, generator=generator, device=index.device) < empty
        drawn = (self.t5_ids[index, which], self.clip_ids[index, which], self.claims[index])
        return Captions(
            *(torch.where(drop, no, yes.long()) for no, yes in zip(self.empty(len(index)), drawn, strict=True))
        )

    def captions_and_told(self, index: torch.Tensor, generator: torch.Generator) -> tuple[Captions, Captions]:
        """One caption each, drawn at random, and the same but for what `told_where` adds."""
        which = self._which(index, generator)
        said = self.claims[index].long()
        own = Captions(self.t5_ids[index, which].long(), self.clip_ids[index, which].long(), said)
        return own, Captions(self.told_t5_ids[index, which].long(), self.told_clip_ids[index, which].long(), said)

    def _which(self, index: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        return torch.randint(self.t5_ids.shape[1], index.shape, generator=generator, device=index.device)

    def empty(self, count: int) -> Captions:
        """The empty caption, `count` times."""
        nothing = torch.tensor(claims(None), device=self.empty_t5.device)
        return Captions(*(ids.long().expand(count, -1) for ids in (self.empty_t5, self.empty_clip, nothing)))


def tokenize(tokenizer: T5Tokenizer | CLIPTokenizer, sentences: list[str], length: int) -> torch.Tensor:
    """int16 [len(sentences), length], padded and truncated as FluxPipeline does.

    Through the Rust tokenizer itself: a million sentences through the Python wrapper take minutes.
    """
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())  # a copy: what follows changes it
    backend.no_padding()
    backend.enable_truncation(length)
    ids = np.full((len(sentences), length), tokenizer.pad_token_id, dtype=np.int16)
    for row, encoding in zip(ids, backend.encode_batch_fast(sentences), strict=True):
        row[: len(encoding.ids)] = encoding.ids
    return torch.from_numpy(ids)


def make_pool(size: int, captions: int, seed: int, clip: CLIPTokenizer, t5: T5Tokenizer) -> Pool:
    """The same pool for the same arguments, on every machine."""
    rng = random.Random(f"pool {seed}")
    backgrounds, colors = list(BACKGROUNDS), list(COLORS)
    background = torch.zeros(size, dtype=torch.int8)
    geometry = torch.zeros(size, MOST_THINGS, 3)
    shape = torch.zeros(size, MOST_THINGS, dtype=torch.int8)
    color = torch.zeros(size, MOST_THINGS, dtype=torch.int8)
    descriptions: list[Description] = []
    sentences: list[str] = []
    told: list[str] = []
    for i in tqdm(range(size), desc="scenes and captions", mininterval=2):
        description = training_description(rng)
        where = told_where(description)
        scene = realize(where, rng)
        descriptions.append(description)
        background[i] = backgrounds.index(scene.background)
        for j, thing in enumerate(scene.things):
            geometry[i, j] = torch.tensor((thing.x, thing.y, thing.radius))
            shape[i, j] = SHAPES.index(thing.shape)
            color[i, j] = colors.index(thing.color)
        own = [caption(description, rng) for _ in range(captions)]
        sentences += own
        told += own if where is description else [caption(where, rng) for _ in range(captions)]

    def ids(which: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        of_t5, of_clip = tokenize(t5, which, T5_LENGTH), tokenize(clip, which, CLIP_LENGTH)
        return of_t5.view(size, captions, T5_LENGTH), of_clip.view(size, captions, CLIP_LENGTH)

    empty_t5, empty_clip = tokenize(t5, [""], T5_LENGTH)[0], tokenize(clip, [""], CLIP_LENGTH)[0]
    claimed = torch.tensor([claims(description) for description in descriptions], dtype=torch.int8)
    return Pool(
        background, geometry, shape, color, *ids(sentences), *ids(told), empty_t5, empty_clip, claimed, descriptions
    )
