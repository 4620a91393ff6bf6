"""How far one tensor is from another."""

from __future__ import annotations

import torch


def relative_error(value: torch.Tensor, reference: torch.Tensor) -> float:
    """||value - reference|| / ||reference||, L2 norms over all elements, in float64."""
    return float((value.double() - reference.double()).norm() / reference.double().norm())
