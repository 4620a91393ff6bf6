"""Fine-tuning on rewards: what counts as good, and where the loss moves the model."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from tiny_flux import scenes
from tiny_flux.checker import Verdict
from tiny_flux.data import training_description
from tiny_flux.drawing import Judges
from tiny_flux.reward import goodness, preference_loss, reward
from tiny_flux.settings import Settings


def test_a_reward_counts_each_claim_and_most_of_all_that_all_hold() -> None:
    assert reward(Verdict({"a": True, "b": True})) == 1
    assert reward(Verdict({"a": True, "b": False})) == 0.25
    assert reward(Verdict({"a": False, "b": False})) == 0


def test_goodness_compares_the_images_of_one_prompt() -> None:
    good = goodness(torch.tensor([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0], [0.25, 0.0, 0.25, 0.0]]))
    assert good[0].tolist() == pytest.approx([0.875, 0.375, 0.375, 0.375])
    assert (good[1] == 0.5).all(), "nothing to prefer"
    assert good[2, 0] > 0.5 > good[2, 1]
    assert good.mean(1).tolist() == pytest.approx([0.5] * 3)


@pytest.fixture
def velocities() -> torch.Tensor:
    """Of the model that drew, and two others: [3, 2, 256, 64]."""
    return torch.randn(3, 2, 256, 64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("good", "direction"), [(1.0, 1), (0.0, -1), (0.5, 0)])
def test_the_loss_moves_towards_good_images_and_away_from_bad_ones(
    velocities: torch.Tensor, good: float, direction: int
) -> None:
    before, wanted, _ = velocities
    now = before.clone().requires_grad_()
    t = torch.tensor([0.2, 0.9])[:, None, None]
    preference_loss(now, before, before, wanted, t, torch.full((2,), good), Settings()).backward()
    assert now.grad is not None
    towards = (-now.grad * (wanted - before)).sum((1, 2))
    if direction:
        assert (towards.sign() == direction).all()
    else:
        assert towards.abs().max() < 1e-6


def test_distance_costs_both_from_the_model_that_drew_and_from_the_one_before_the_stage(
    velocities: torch.Tensor,
) -> None:
    before, wanted, away = velocities
    t, good = torch.full((2, 1, 1), 0.5), torch.full((2,), 0.5)
    far = [before + distance * away for distance in (0.0, 0.5, 1.0)]
    from_drawing = [preference_loss(now, before, now, wanted, t, good, Settings()) for now in far]
    assert from_drawing[0] < from_drawing[1] < from_drawing[2]
    from_first = [preference_loss(before, before, first, wanted, t, good, Settings()) for first in far]
    assert from_first[0] < from_first[1] < from_first[2]
    free = [preference_loss(before, before, first, wanted, t, good, Settings(reward_anchor=0)) for first in far]
    assert free[0] == free[2]


def test_judges_say_of_each_image_what_it_shows_in_the_order_given() -> None:
    rng = random.Random(0)
    shown = [replace(training_description(rng), background="white") for _ in range(20)]
    images = (scenes.render([scenes.realize(d, rng) for d in shown]) * 255).round().byte().permute(0, 2, 3, 1)
    claimed = [d if i % 3 else replace(d, background="black") for i, d in enumerate(shown)]
    with Judges(20) as judges:
        judges.give(images[:18], claimed[:18])
        judges.give(images[18:], claimed[18:])
        first = [verdict.right for verdict in judges.verdicts()]
        judges.give(images[:2], claimed[:2])
        second = [verdict.right for verdict in judges.verdicts()]
    assert first == [i % 3 != 0 for i in range(20)]
    assert second == [False, True]
