"""Told when a module's weights move, and only then."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

from recipes.float8 import quantize_linears
from utils.moving import when_moved


@pytest.fixture
def told() -> tuple[nn.Sequential, list[int]]:
    """A module with another inside, and as many elements as it was told that the inner one moved."""
    module, times = nn.Sequential(nn.Sequential(nn.Linear(32, 32), nn.BatchNorm1d(32)), nn.Linear(32, 32)), []
    when_moved(module[0], lambda: times.append(1))
    return module, times


@pytest.mark.parametrize(
    "move",
    [
        nn.Module.bfloat16,
        lambda m: m.to(torch.float64),
        lambda m: m.to("meta"),
        lambda m: m[0].half(),
        lambda m: m.load_state_dict({name: tensor.clone() for name, tensor in m.state_dict().items()}, assign=True),
        lambda m: m[0].load_state_dict(copy.deepcopy(m[0]).state_dict(), assign=True),
    ],
    ids=["dtype", "to-dtype", "device", "itself", "assigned", "itself-assigned"],
)
def test_told_of_other_memory(told: tuple[nn.Sequential, list[int]], move: Callable) -> None:
    module, times = told
    move(module)
    assert times == [1]
    assert module[0][0].weight.dtype == module[0][1].running_mean.dtype


def test_not_told_where_nothing_moves(told: tuple[nn.Sequential, list[int]]) -> None:
    module, times = told
    module.to("cpu").float().eval().requires_grad_(False)
    module[1].double()
    with torch.no_grad():
        module[0][0].weight.mul_(2)
    module.load_state_dict({name: 2 * tensor for name, tensor in module.state_dict().items()})
    assert not times


def test_told_each_who_asked(told: tuple[nn.Sequential, list[int]]) -> None:
    module, times = told
    others: list[int] = []
    when_moved(module[0], lambda: others.append(1))
    module.double()
    assert times == others == [1]


def test_a_copy_moves_alone(told: tuple[nn.Sequential, list[int]]) -> None:
    module, _ = told
    copied = copy.deepcopy(module).double()
    assert copied[0][0].weight.dtype == torch.float64
    assert module[0][0].weight.dtype == torch.float32


def test_float8_weights(told: tuple[nn.Sequential, list[int]]) -> None:
    module, times = told
    quantize_linears([module[0][0]], "float8_per_row")
    module.to("cpu")
    assert not times
    module.to("meta")
    assert times == [1]
