"""The training pool: described scenes as tensors, each with a few captions already tokenized."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm
from transformers import CLIPTokenizer, T5Tokenizer

from tiny_flux.captions import caption
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

MOST_THINGS = 4
# How often each category is trained on; what is harder to learn comes more often.
_WEIGHTS = {
    "single_object": 0.08,
    "colors": 0.10,
    "counting": 0.22,
    "two_objects": 0.14,
    "color_attribution": 0.16,
    "position": 0.20,
    EXTRA_CATEGORY: 0.10,
}


def training_description(rng: random.Random) -> Description:
    """A random description whose combination of objects isn't held out."""
    while True:
        (category,) = rng.choices([*CATEGORIES, EXTRA_CATEGORY], [_WEIGHTS[c] for c in (*CATEGORIES, EXTRA_CATEGORY)])
        description = sample_description(rng, category)
        if not is_held_out(description):
            return description


def corpus(seed: int, sentences: int = 50_000) -> list[str]:
    """Training captions to build the tokenizers from."""
    rng = random.Random(f"corpus {seed}")
    return [caption(training_description(rng), rng) for _ in range(sentences)]


@dataclass
class Pool:
    """`n` scenes with `k` captions each.

    background [n, 3], geometry [n, 4, 3], shape [n, 4] and color [n, 4, 3] as `scenes.draw` takes them;
    t5_ids [n, k, 64] and clip_ids [n, k, 77] int16; empty_t5 [64] and empty_clip [77] int16: the empty caption.
    """

    background: torch.Tensor
    geometry: torch.Tensor
    shape: torch.Tensor
    color: torch.Tensor
    t5_ids: torch.Tensor
    clip_ids: torch.Tensor
    empty_t5: torch.Tensor
    empty_clip: torch.Tensor

    def __len__(self) -> int:
        return len(self.background)

    def to(self, device: torch.device | str) -> Pool:
        return Pool(**{name: tensor.to(device) for name, tensor in vars(self).items()})

    def images(self, index: torch.Tensor) -> torch.Tensor:
        """float32 [len(index), 3, 256, 256] in [-1, 1]."""
        image = draw(self.background[index], self.geometry[index], self.shape[index].long(), self.color[index])
        return image * 2 - 1

    def tokens(
        self, index: torch.Tensor, generator: torch.Generator, empty: float = 0.0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One caption each, drawn at random, or with probability `empty` the empty one.

        T5 ids [len(index), 64] and CLIP ids [len(index), 77], int64.
        """
        which = torch.randint(self.t5_ids.shape[1], index.shape, generator=generator, device=index.device)
        t5_ids, clip_ids = self.t5_ids[index, which].long(), self.clip_ids[index, which].long()
        drop = torch.rand(len(index), 1, generator=generator, device=index.device) < empty
        empty_t5, empty_clip = self.empty(len(index))
        return torch.where(drop, empty_t5, t5_ids), torch.where(drop, empty_clip, clip_ids)

    def empty(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The empty caption's ids, `count` times."""
        return self.empty_t5.long().expand(count, -1), self.empty_clip.long().expand(count, -1)


def tokenize(tokenizer: T5Tokenizer | CLIPTokenizer, sentences: list[str], length: int) -> torch.Tensor:
    """int16 [len(sentences), length], padded and truncated as FluxPipeline does.

    Through the Rust tokenizer itself: a million sentences through the Python wrapper take minutes.
    """
    backend = tokenizer.backend_tokenizer
    backend.no_padding()
    backend.enable_truncation(length)
    ids = np.full((len(sentences), length), tokenizer.pad_token_id, dtype=np.int16)
    for row, encoding in zip(ids, backend.encode_batch_fast(sentences), strict=True):
        row[: len(encoding.ids)] = encoding.ids
    return torch.from_numpy(ids)


def make_pool(size: int, captions: int, seed: int, clip: CLIPTokenizer, t5: T5Tokenizer) -> Pool:
    """The same pool for the same arguments, on every machine."""
    rng = random.Random(f"pool {seed}")
    colors = {name: torch.tensor(rgb, dtype=torch.float32) for name, rgb in COLORS.items()}
    backgrounds = {name: torch.tensor(rgb, dtype=torch.float32) for name, rgb in BACKGROUNDS.items()}
    background = torch.zeros(size, 3)
    geometry = torch.zeros(size, MOST_THINGS, 3)
    shape = torch.zeros(size, MOST_THINGS, dtype=torch.int8)
    color = torch.zeros(size, MOST_THINGS, 3)
    sentences: list[str] = []
    for i in tqdm(range(size), desc="scenes and captions", mininterval=2):
        description = training_description(rng)
        scene = realize(description, rng)
        background[i] = backgrounds[scene.background]
        for j, thing in enumerate(scene.things):
            geometry[i, j] = torch.tensor((thing.x, thing.y, thing.radius))
            shape[i, j] = SHAPES.index(thing.shape)
            color[i, j] = colors[thing.color]
        sentences += [caption(description, rng) for _ in range(captions)]

    t5_ids = tokenize(t5, sentences, T5_LENGTH).view(size, captions, T5_LENGTH)
    clip_ids = tokenize(clip, sentences, CLIP_LENGTH).view(size, captions, CLIP_LENGTH)
    empty_t5, empty_clip = tokenize(t5, [""], T5_LENGTH)[0], tokenize(clip, [""], CLIP_LENGTH)[0]
    return Pool(background, geometry, shape, color, t5_ids, clip_ids, empty_t5, empty_clip)
