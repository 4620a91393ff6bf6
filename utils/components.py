"""A pipeline's components that have weights, and the tensors that these are made of."""

from __future__ import annotations

import torch
from diffusers import DiffusionPipeline
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def modules(pipe: DiffusionPipeline) -> dict[str, nn.Module]:
    """The components that have weights, by name."""
    return {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}


def plain_tensors(tensor: torch.Tensor) -> list[torch.Tensor]:
    """A tensor subclass's own tensors, such as float8 values and their scale; of another it itself."""
    names = plain_names(tensor)
    return [getattr(tensor, name) for name in names] if names else [tensor]


def plain_names(tensor: torch.Tensor) -> list[str]:
    """The attributes in which a tensor subclass has its own tensors; of another none."""
    return tensor.__tensor_flatten__()[0] if is_traceable_wrapper_subclass(tensor) else []
