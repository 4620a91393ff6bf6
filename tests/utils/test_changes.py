"""Told when a module's weights move or are others, and only then."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from torch import nn

from recipes.float8 import quantize_linears
from utils.changes import when_changed


@pytest.fixture
def told() -> tuple[nn.Sequential, list[int]]:
    """A module with another inside, and as many elements as it was told that the inner one moved."""
    module, times = nn.Sequential(nn.Sequential(nn.Linear(32, 32), nn.BatchNorm1d(32)), nn.Linear(32, 32)), []
    module[0][0].processor = FluxAttnProcessor()
    when_changed(module[0], lambda: times.append(1))
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
    when_changed(module[0], lambda: others.append(1))
    module.double()
    assert times == others == [1]


def test_a_copy_moves_alone(told: tuple[nn.Sequential, list[int]]) -> None:
    module, times = told
    copied = copy.deepcopy(module)
    copied.double()
    assert copied[0][0].weight.dtype == torch.float64
    assert module[0][0].weight.dtype == torch.float32
    before = len(times)
    module(torch.ones(4, 32))
    assert len(times) == before
    module[0][0].bias = nn.Parameter(torch.zeros(32))
    module(torch.ones(4, 32))
    assert len(times) == before + 1, "the module is watched as before"


def test_float8_weights(told: tuple[nn.Sequential, list[int]]) -> None:
    module, times = told
    quantize_linears([module[0][0]], "float8_per_row")
    module.to("cpu")
    assert times == [1], "of the weight that it had before"
    module.to("cpu")
    assert times == [1]
    module.to("meta")
    assert times == [1, 1]


def test_a_float8_weight_that_was_swapped(told: tuple[nn.Sequential, list[int]]) -> None:
    module, times = told
    quantize_linears([module[0][0]], "float8_per_row")
    module.to("cpu")
    assert times == [1]
    torch.utils.swap_tensors(module[0][0].weight, nn.Parameter(torch.zeros(32, 32)))
    module(torch.ones(4, 32))
    assert times == [1, 1]


def _new_bias(module: nn.Sequential) -> None:
    module[0].bias = nn.Parameter(torch.zeros(32))


def _other_data(module: nn.Sequential) -> None:
    module[0].weight.data = torch.zeros(32, 32)


def _new_part(module: nn.Sequential) -> None:
    module[0] = nn.Linear(32, 32)


def _of_a_new_part(module: nn.Sequential) -> None:
    module[0].weight.data = torch.zeros(32, 32)


def _hook(module: nn.Sequential) -> None:
    module[0].register_forward_hook(lambda *_: None)


def _processor(module: nn.Sequential) -> None:
    module[0].processor = FluxAttnProcessor()


def _assign(module: nn.Sequential) -> None:
    module[1].load_state_dict({name: x.clone() for name, x in module[1].state_dict().items()}, assign=True)


def test_told_of_what_a_part_has_got_before_the_next_call(told: tuple[nn.Sequential, list[int]]) -> None:
    module, times = told
    changes = [_processor, _new_bias, _other_data, _new_part, _of_a_new_part, _hook, _assign]
    for count, change in enumerate(changes, start=1):
        change(module[0])
        assert len(times) == count - 1
        module(torch.ones(4, 32))
        assert len(times) == count, change
        module(torch.ones(4, 32))
        assert len(times) == count, "told once"


class Step(nn.Linear):
    def forward(self, latents: torch.Tensor, img_ids: torch.Tensor) -> torch.Tensor:
        return super().forward(latents)


def test_steps_of_a_pipelines_call_are_spared() -> None:
    module, times = Step(2, 3), []
    when_changed(module, lambda: times.append(1))
    ids, latents = torch.zeros(1, 3), torch.ones(1, 2)
    module(latents, img_ids=ids)
    module.weight.data = torch.zeros(3, 2)
    module(latents + 1, img_ids=ids)
    assert not times
    module(latents, img_ids=ids.clone())
    assert times == [1], "the next call has ids of its own, and maybe all else as it was"


def test_other_hooks_are_told_from_as_many(told: tuple[nn.Sequential, list[int]]) -> None:
    module, times = told
    first = module[0][0].register_forward_hook(lambda *_: None)
    module(torch.ones(4, 32))
    assert times == [1]
    first.remove()
    module[0][0].register_forward_hook(lambda *_: None)
    module(torch.ones(4, 32))
    assert times == [1, 1]
