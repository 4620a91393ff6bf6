"""Muon in batches makes torch.optim.Muon's steps."""

from __future__ import annotations

import torch

from tiny_flux.muon import Muon, orthogonal
from utils.relative_error import relative_error

OPTIONS = {"lr": 1e-2, "weight_decay": 0.1, "adjust_lr_fn": "match_rms_adamw"}


def test_steps_are_those_of_pytorch() -> None:
    random = torch.Generator().manual_seed(0)
    shapes = [(32, 64), (64, 32), (32, 64), (48, 48), (64, 32), (32, 64)]
    starts = [torch.randn(shape, generator=random) for shape in shapes]
    theirs, ours = ([torch.nn.Parameter(start.clone()) for start in starts] for _ in range(2))
    optimizers = torch.optim.Muon(theirs, **OPTIONS), Muon(ours, **OPTIONS)
    for number in range(5):
        for one, other in zip(theirs, ours, strict=True):
            one.grad = torch.randn(one.shape, generator=random)
            other.grad = one.grad.clone()
        ours[3].grad = theirs[3].grad = None if number == 2 else ours[3].grad  # nothing to learn from in this step
        for optimizer in optimizers:
            optimizer.step()
    for start, one, other in zip(starts, theirs, ours, strict=True):
        assert (
            relative_error(*(p.detach() - start for p in (other, one))) < 1e-2
        )  # what bfloat16's rounding makes of it
    momenta = [
        [optimizer.state[p]["momentum_buffer"] for p in of]
        for optimizer, of in zip(optimizers, (theirs, ours), strict=True)
    ]
    torch.testing.assert_close(*momenta)


def test_state_goes_from_one_to_the_other() -> None:
    parameter = torch.nn.Parameter(torch.randn(4, 8))
    parameter.grad = torch.randn(4, 8)
    theirs, ours = torch.optim.Muon([parameter], **OPTIONS), Muon([parameter], **OPTIONS)
    theirs.step()
    ours.load_state_dict(theirs.state_dict())
    assert torch.equal(ours.state[parameter]["momentum_buffer"], theirs.state[parameter]["momentum_buffer"])


def test_singular_values_end_near_one() -> None:
    matrices = torch.randn(3, 40, 24, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonal(matrices, (3.4445, -4.775, 2.0315), 5, 1e-7).float())
    assert values.min() > 0.5
    assert values.max() < 1.3
