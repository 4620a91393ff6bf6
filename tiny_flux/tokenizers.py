"""The embedded model's two tokenizers: built from the captions' vocabulary, in transformers' own classes."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable

from transformers import CLIPTokenizer, T5Tokenizer

T5_LENGTH = 64  # tokens of a prompt, padding and end token included
CLIP_LENGTH = 77

_CLIP_VOCABULARY = 1024
_END = "</w>"  # what CLIP writes behind the last piece of a word
_PRINTABLE = [chr(code) for code in range(33, 127)]


def t5_tokenizer(corpus: Iterable[str]) -> T5Tokenizer:
    """A unigram tokenizer: one piece for each word of the corpus, single characters for everything else.

    The ids of padding, end and unknown are T5's: 0, 1, 2. Punctuation that ends a word is a piece of its own.
    """
    words: Counter[str] = Counter()
    for sentence in corpus:
        words.update(word.rstrip(".,:;!?") for word in sentence.split())
    total = sum(words.values())
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -12.0)]
    pieces += [(f"\u2581{word}", math.log(count / total)) for word, count in sorted(words.items()) if word]
    pieces += [(character, -12.0) for character in _PRINTABLE]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=T5_LENGTH)


def clip_tokenizer(corpus: Iterable[str]) -> CLIPTokenizer:
    """A byte-level BPE tokenizer as CLIP's, its merges learned from the corpus; unknown words fall to bytes.

    The same one for the same corpus in every process, without which a training run could not be resumed.
    """
    # One-letter words of one and two bytes put every byte, also as the end of a word, into the alphabet.
    sentences = [*corpus, *(chr(code) for code in range(33, 0x800))]
    first = CLIPTokenizer().train_new_from_iterator(sentences, vocab_size=_CLIP_VOCABULARY)
    # The trainer numbers the ends of words in the order of a hash table that differs from process to process, and lets
    # these numbers decide between merges of the same frequency. As special tokens they get fixed ones.
    ends = sorted(token for token in first.get_vocab() if token.endswith(_END) and len(token) == 1 + len(_END))
    second = first.train_new_from_iterator(sentences, vocab_size=_CLIP_VOCABULARY, new_special_tokens=ends)
    model = json.loads(second.backend_tokenizer.to_str())["model"]
    merges = [tuple(pair) for pair in model["merges"]]
    return CLIPTokenizer(vocab=model["vocab"], merges=merges, model_max_length=CLIP_LENGTH)
