"""Training on several GPUs: one process each, as `torchrun` starts them.

    torchrun --nproc-per-node 4 -m tiny_flux.train --out assets/tiny-flux

Each process has scenes of its own; gradients are averaged, so that all make the same steps (synchronous data
parallelism). The first process alone writes what they share. Without torchrun there is that one only.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn


def join(device: str) -> torch.device:
    """Join the processes that torchrun started, if it did; gives this process's device."""
    if "LOCAL_RANK" not in os.environ:
        return torch.device(device)
    if not device.startswith("cuda"):
        dist.init_process_group("gloo")
        return torch.device(device)
    own = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(own)
    dist.init_process_group("nccl", device_id=own)
    return own


def leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def count() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_first() -> bool:
    return rank() == 0


def own_folder(work: Path) -> Path:
    """Where this process keeps what the others don't share: its scenes' latents, its pairs."""
    folder = work if is_first() else work / f"rank-{rank()}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def own_seed(seed: int) -> int:
    """A seed for scenes that no other process has."""
    return seed + 1_000_003 * rank()


@torch.no_grad()
def share(parameters: Sequence[nn.Parameter]) -> None:
    """Give all processes the first one's weights."""
    if dist.is_initialized():
        for parameter in parameters:
            dist.broadcast(parameter, 0)


@torch.no_grad()
def average_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Put the mean over all processes into every gradient; which ones there are is the same everywhere."""
    if not dist.is_initialized():
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([g.flatten() for g in gradients])  # one message instead of hundreds
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


def from_first(*values: float, device: torch.device) -> tuple[float, ...]:
    """The first process's values, in all of them."""
    if not dist.is_initialized():
        return values
    tensor = torch.tensor(values, dtype=torch.float64, device=device)
    dist.broadcast(tensor, 0)
    return tuple(tensor.tolist())
