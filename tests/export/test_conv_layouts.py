"""FakeTensor's cache is left out while what holds convolutions is compiled, and only then."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo import config

from export import build, conv_layouts, regions
from export.build import Call
from tests.export.conftest import inputs_of_after


@pytest.fixture(autouse=True)
def _cached() -> Iterator[None]:
    """As PyTorch has it, whatever the environment says."""
    with config.patch(fake_tensor_cache_enabled=True):
        yield


def test_only_around_convolutions() -> None:
    with conv_layouts.as_computed(nn.Sequential(nn.Linear(2, 2))):
        assert config.fake_tensor_cache_enabled
    with pytest.raises(ZeroDivisionError), conv_layouts.as_computed(nn.Sequential(nn.Conv2d(2, 2, 1))):
        assert not config.fake_tensor_cache_enabled
        raise ZeroDivisionError
    assert config.fake_tensor_cache_enabled


@pytest.mark.parametrize("convolution", [False, True])
def test_regions_are_compiled_so(convolution: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def compiling(*arguments: Any, **options: Any) -> list[str]:
        seen.append(config.fake_tensor_cache_enabled)
        return []

    monkeypatch.setattr(torch._inductor, "aot_compile", compiling)
    module = _First(nn.Conv2d(1, 1, 1) if convolution else nn.Identity())
    assert build.compile_call(Call(regions.AFTER, module, inputs_of_after()), {}, embed_weights=False) == []
    assert seen == [not convolution]


class _First(nn.Module):
    def __init__(self, part: nn.Module):
        super().__init__()
        self.part = part

    def forward(self, hidden_states: torch.Tensor, temb: torch.Tensor) -> torch.Tensor:
        return hidden_states + 1
