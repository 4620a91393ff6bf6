"""A module's tensors as AOTInductor names them, what they have to be, and what is wrong with them."""

from __future__ import annotations

import hashlib

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from export.manifest import Model, TensorSpec
from utils.components import plain_tensors


def exported_tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """A module's parameters and buffers by the names that torch.export gives them.

    A tensor subclass, such as float8's weight with its scale, counts as its inner tensors, which export names as those
    of a parametrization.
    """
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if is_traceable_wrapper_subclass(tensor):
            owner, _, leaf = name.rpartition(".")
            parts = enumerate(plain_tensors(tensor))
            tensors |= {f"{owner}.parametrizations.{leaf}.original{i}": part for i, part in parts}
        else:
            tensors[name] = tensor
    return tensors


def specs(tensors: dict[str, torch.Tensor]) -> dict[str, TensorSpec]:
    return {name: TensorSpec.of(tensor) for name, tensor in tensors.items()}


def refusal(model: Model, tensors: dict[str, torch.Tensor], device: torch.device) -> str | None:
    """Why a module's tensors don't fit a model, naming both sides; None if they do.

    AOTInductor takes any tensor under any name, and reads it as the one that it was compiled for.
    """
    here = specs(tensors)
    missing, extra = sorted(set(model.weights) - set(here)), sorted(set(here) - set(model.weights))
    if missing:
        return f"wants the weight {missing[0]}, which the {model.region} here lacks ({len(missing)} missing)"
    if extra:
        return f"has no weight {extra[0]}, which the {model.region} here has ({len(extra)} more than it knows)"
    for name, wanted in model.weights.items():
        if here[name] != wanted:
            return f"wants the weight {name} as {wanted}, here it is {here[name]}"
        if name in model.bound and tensors[name].device != device:
            return f"wants the weight {name} on {device}, here it is on {tensors[name].device}"
    return None


def fingerprint(tensors: dict[str, torch.Tensor]) -> str:
    """A sha256 of tensors' names, shapes, dtypes and values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {TensorSpec.of(tensor.contiguous())}".encode())
        # Through bytes: NumPy knows neither bfloat16 nor float8.
        digest.update(tensor.detach().contiguous().flatten().view(torch.uint8).cpu().numpy().data)
    return digest.hexdigest()
