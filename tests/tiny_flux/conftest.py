"""What several tests of the training share."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn


@pytest.fixture
def fitted() -> Callable[..., tuple[float, float]]:
    """fitted(head, states, labels, lr): the head's loss before and after 300 steps of Adam."""

    def fit(head: nn.Module, states: torch.Tensor, labels: object, lr: float) -> tuple[float, float]:
        optimizer = torch.optim.Adam(head.parameters(), lr=lr)
        losses = []
        for _ in range(300):
            optimizer.zero_grad()
            loss = head.loss(states, labels)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses[0], losses[-1]

    return fit
