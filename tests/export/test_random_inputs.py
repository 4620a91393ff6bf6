"""What packages are verified on."""

from __future__ import annotations

import torch

from export.manifest import TensorSpec
from export.regions import contiguous_strides
from export.verify import random_inputs

HEAD_DIM, TOKENS = 128, 24


def _inputs(dtype: str, *names: str) -> tuple[torch.Tensor, ...]:
    spec = TensorSpec((TOKENS, HEAD_DIM), contiguous_strides((TOKENS, HEAD_DIM)), dtype)
    inputs = random_inputs({name: spec for name in names}, torch.device("cpu"))
    (table,) = inputs.values()
    return table


def test_rotary_embedding_does_not_stretch() -> None:
    """Scores in float16 hold only of queries and keys as long as their norm made them."""
    for owner in ("rotary", "image_rotary_emb"):
        cos, sin = _inputs("float32", f"{owner}.0", f"{owner}.1")
        torch.testing.assert_close(cos**2 + sin**2, torch.ones(TOKENS, HEAD_DIM))
        for table in (cos, sin):
            assert torch.equal(table[:, ::2], table[:, 1::2]), "a pair of columns turns by one angle"
        assert len(cos.unique()) > TOKENS
        (turns,) = _inputs("float16", f"{owner}.0")
        assert torch.equal(turns, torch.stack([cos[:, ::2], sin[:, ::2]], dim=-1).flatten(1).half())
