"""The training pool and its tokens."""

from __future__ import annotations

import random
import re
import subprocess
import sys

import pytest
import torch
from transformers import CLIPTokenizer, T5Tokenizer

from tiny_flux import scenes
from tiny_flux.claims import claims
from tiny_flux.data import Pool, corpus, make_pool, tokenize, training_description
from tiny_flux.scenes import Described, Description
from tiny_flux.tokenizers import CLIP_LENGTH, T5_LENGTH, clip_tokenizer, t5_tokenizer
from utils.errors import UsageError
from utils.files import ROOT

SIZE, CAPTIONS = 600, 2
NUMBERS = {"a": 1, "an": 1, "two": 2, "2": 2, "three": 3, "3": 3, "four": 4, "4": 4}
# Number, colour (in one of two places) and shape of each object in a caption; of a size there is one word.
OBJECT = re.compile(
    rf"\b({'|'.join(NUMBERS)}) (?:\w+ )??(?:({'|'.join(scenes.COLORS)}) )?({'|'.join(scenes.SHAPES)})(?:e?s)?\b"
    rf"(?: that (?:is|are) ({'|'.join(scenes.COLORS)}))?"
)
UNUSUAL = [
    "",
    "Ein Kreis, ganz rot!",
    "naïve 圆 🙂",
    "red " * 200,
    "a red circle" * 30,
    "A RED CIRCLE.",
    "  a  circle ",
]


@pytest.fixture(scope="module")
def sentences() -> list[str]:
    return corpus(seed=1, sentences=5000)


@pytest.fixture(scope="module")
def t5(sentences: list[str]) -> T5Tokenizer:
    return t5_tokenizer(sentences)


@pytest.fixture(scope="module")
def clip(sentences: list[str]) -> CLIPTokenizer:
    return clip_tokenizer(sentences)


@pytest.fixture(scope="module")
def pool(clip: CLIPTokenizer, t5: T5Tokenizer) -> Pool:
    return make_pool(SIZE, CAPTIONS, 0, clip, t5)


def test_no_training_description_is_held_out() -> None:
    rng = random.Random(0)
    some = [training_description(rng) for _ in range(5000)]
    assert not any(map(scenes.is_held_out, some))
    assert {d.category for d in some} == {*scenes.CATEGORIES, scenes.EXTRA_CATEGORY}


def test_no_caption_of_the_pool_is_of_a_held_out_combination(pool: Pool, t5: T5Tokenizer) -> None:
    for text in t5.batch_decode(torch.cat([pool.t5_ids, pool.told_t5_ids]).flatten(0, 1), skip_special_tokens=True):
        found = OBJECT.findall(text.lower())
        assert len(found) == sum(text.lower().count(shape) for shape in scenes.SHAPES)
        objects = (Described(shape, color or after or None, count=NUMBERS[n]) for n, color, shape, after in found)
        assert not scenes.is_held_out(Description("any", tuple(objects))), text


def test_a_pool_depends_on_its_arguments_alone(pool: Pool, clip: CLIPTokenizer, t5: T5Tokenizer) -> None:
    torch.manual_seed(99)
    random.seed(99)
    again = make_pool(SIZE, CAPTIONS, 0, clip, t5)
    tensors = {name: value for name, value in vars(again).items() if isinstance(value, torch.Tensor)}
    assert all(torch.equal(vars(pool)[name], tensor) for name, tensor in tensors.items())
    assert again.descriptions == pool.descriptions
    other = make_pool(SIZE, CAPTIONS, 1, clip, t5)
    drawn = [name for name in tensors if not name.startswith("empty_")]
    assert not any(torch.equal(vars(pool)[name], getattr(other, name)) for name in drawn)
    assert other.descriptions != pool.descriptions


def test_the_pools_images_are_of_its_scenes(pool: Pool) -> None:
    index = torch.tensor([0, 17, 599])
    images = pool.images(index)
    assert images.shape == (3, 3, 256, 256)
    for i, image in zip(index.tolist(), images, strict=True):
        things = tuple(
            scenes.Thing(
                scenes.SHAPES[int(pool.shape[i, j])],
                list(scenes.COLORS)[int(pool.color[i, j])],
                *pool.geometry[i, j].tolist(),
            )
            for j in range(4)
            if pool.geometry[i, j, 2] > 0
        )
        assert 1 <= len(things) <= 4
        drawn = scenes.render([scenes.Scene(list(scenes.BACKGROUNDS)[int(pool.background[i])], things)])[0]
        assert torch.equal((image + 1) / 2, (drawn * 2 - 1 + 1) / 2)


def test_what_only_shapes_tell_apart_stands_as_named(pool: Pool, t5: T5Tokenizer) -> None:
    index = torch.arange(SIZE)
    own, told = pool.captions_and_told(index, torch.Generator().manual_seed(0))
    assert torch.equal(own.t5_ids, pool.captions(index, torch.Generator().manual_seed(0)).t5_ids)
    assert torch.equal(own.claims, told.claims)
    by_shape = [
        len(d.objects) == 2 and d.relation is None and all(o.count == 1 and o.color is None for o in d.objects)
        for d in pool.descriptions
    ]
    assert sum(by_shape) > 20
    for i, more in enumerate(by_shape):
        said, words = t5.batch_decode([own.t5_ids[i], told.t5_ids[i]], skip_special_tokens=True)
        if not more:
            assert said == words
            continue
        assert "left" in words.lower()
        assert "left" not in said.lower()
        things = [
            scenes.Thing(scenes.SHAPES[int(pool.shape[i, j])], "red", *pool.geometry[i, j].tolist()) for j in range(2)
        ]
        assert [thing.shape for thing in things] == [o.shape for o in pool.descriptions[i].objects]
        assert scenes.relation_of(*things) == "left of"


def test_one_of_the_captions_is_drawn_at_random(pool: Pool) -> None:
    index = torch.arange(SIZE)
    t5_ids, clip_ids, claimed = pool.captions(index, torch.Generator().manual_seed(0))
    assert (t5_ids.shape, clip_ids.shape) == ((SIZE, T5_LENGTH), (SIZE, CLIP_LENGTH))
    assert t5_ids.dtype == clip_ids.dtype == claimed.dtype == torch.int64
    first = (t5_ids == pool.t5_ids[:, 0]).all(1) & (clip_ids == pool.clip_ids[:, 0]).all(1)
    second = (t5_ids == pool.t5_ids[:, 1]).all(1) & (clip_ids == pool.clip_ids[:, 1]).all(1)
    assert (first | second).all(), "both texts of a pair are of the same caption"
    assert 0.4 * SIZE < first.sum() < 0.6 * SIZE + (first & second).sum()
    assert claimed.tolist() == [claims(description) for description in pool.descriptions]


def test_some_captions_are_empty_and_claim_nothing(pool: Pool, t5: T5Tokenizer, clip: CLIPTokenizer) -> None:
    captions = pool.captions(torch.arange(SIZE), torch.Generator().manual_seed(0), empty=0.3)
    empty = (captions.t5_ids == tokenize(t5, [""], T5_LENGTH).long()).all(1)
    assert 0.2 * SIZE < empty.sum() < 0.4 * SIZE
    assert torch.equal(empty, (captions.clip_ids == tokenize(clip, [""], CLIP_LENGTH).long()).all(1))
    assert torch.equal(empty, (captions.claims == 0).all(1))


def test_tokenizing_leaves_the_tokenizer_as_it_was(t5: T5Tokenizer) -> None:
    before = t5.backend_tokenizer.to_str()
    tokenize(t5, ["a red circle"], 16)
    assert t5.backend_tokenizer.to_str() == before


@pytest.mark.parametrize("length", [T5_LENGTH, 16])
def test_t5_tokens_are_those_of_the_pipelines_call(t5: T5Tokenizer, sentences: list[str], length: int) -> None:
    texts = [*sentences[:500], *UNUSUAL]
    wanted = t5(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids
    assert torch.equal(tokenize(t5, texts, length).long(), wanted)


@pytest.mark.parametrize("length", [CLIP_LENGTH, 16])
def test_clip_tokens_are_those_of_the_pipelines_call(clip: CLIPTokenizer, sentences: list[str], length: int) -> None:
    texts = [*sentences[:500], *UNUSUAL]
    wanted = clip(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids
    assert torch.equal(tokenize(clip, texts, length).long(), wanted)


def test_tokens_decode_to_the_caption(clip: CLIPTokenizer, t5: T5Tokenizer, sentences: list[str]) -> None:
    t5_ids, clip_ids = tokenize(t5, sentences, T5_LENGTH), tokenize(clip, sentences, CLIP_LENGTH)
    assert t5.unk_token_id not in t5_ids
    for text, whole, lower in zip(
        sentences,
        t5.batch_decode(t5_ids, skip_special_tokens=True),
        clip.batch_decode(clip_ids, skip_special_tokens=True),
        strict=True,
    ):
        assert whole == text
        assert lower.replace(" ", "") == text.lower().replace(" ", "")


def test_tokenizers_are_the_same_in_every_process() -> None:
    # A resumed training run makes them anew, and goes on with embeddings that belong to their ids.
    program = (
        "from tiny_flux.data import corpus; from tiny_flux.tokenizers import clip_tokenizer, t5_tokenizer\n"
        "sentences = corpus(seed=1, sentences=5000)\n"
        "for make in (clip_tokenizer, t5_tokenizer): print(make(sentences).backend_tokenizer.to_str())"
    )
    here = [clip_tokenizer(corpus(1, 5000)), t5_tokenizer(corpus(1, 5000))]
    for _ in range(2):
        ended = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
        found = [line for line in ended.stdout.splitlines() if line]  # the trainer's progress leaves empty ones
        assert found == [tokenizer.backend_tokenizer.to_str() for tokenizer in here], ended.stderr


def test_clip_tokenizer_knows_every_byte_and_frequent_words_whole(clip: CLIPTokenizer) -> None:
    assert (len(clip), clip.bos_token_id, clip.eos_token_id, clip.pad_token_id) == (1024, 0, 1, 1)
    assert clip("a circle").input_ids == [0, *clip.convert_tokens_to_ids(["a</w>", "circle</w>"]), 1]
    assert clip.decode(clip("naïve 圆 🙂 !").input_ids, skip_special_tokens=True).split() == ["naïve", "圆", "🙂", "!"]
    assert clip.all_special_tokens == ["<|startoftext|>", "<|endoftext|>"]


def test_no_caption_is_cut(pool: Pool, clip: CLIPTokenizer, t5: T5Tokenizer) -> None:
    assert (pool.t5_ids[..., -1] == t5.pad_token_id).all()
    assert (pool.clip_ids[..., -1] == clip.pad_token_id).all()
    assert pool.clip_ids.max() < len(clip)
    assert pool.t5_ids.max() < len(t5)


def test_scenes_of_given_categories(pool: Pool) -> None:
    index = pool.of_categories(("two_objects", "several_objects")).tolist()
    named = [description.category in ("two_objects", "several_objects") for description in pool.descriptions]
    assert index == [i for i, of_them in enumerate(named) if of_them]
    assert 0 < len(index) < len(pool)
    with pytest.raises(UsageError, match="there is no category 'blobs'"):
        pool.of_categories(("blobs",))
