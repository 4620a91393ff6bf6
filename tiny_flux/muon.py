"""torch.optim.Muon with matrices of one shape as a batch.

PyTorch's takes one matrix after the other: some forty of 15 launches an iteration each, which for a model this small
take longer than its forward and backward pass (28 of 53 ms a step, profiled on an H100).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch


class Muon(torch.optim.Muon):
    """Its options and state are torch.optim.Muon's; with Nesterov momentum and steps of AdamW's size only.

    Sources: https://kellerjordan.github.io/posts/muon, and for the size of the steps arXiv 2502.16982, section 2.2.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None if closure is None else closure()
        for group in self.param_groups:
            assert group["nesterov"]
            assert group["adjust_lr_fn"] == "match_rms_adamw"
            for shape, parameters in _by_shape(group["params"]).items():
                gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
                momenta = [self._momentum(parameter) for parameter in parameters]
                torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
                updates = torch._foreach_lerp(gradients, momenta, group["momentum"])
                steps = orthogonal(torch.stack(updates), group["ns_coefficients"], group["ns_steps"], group["eps"])
                torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
                size = group["lr"] * 0.2 * max(shape) ** 0.5
                torch._foreach_add_(parameters, list(steps.to(parameters[0].dtype).unbind()), alpha=-size)
        return loss

    def _momentum(self, parameter: torch.Tensor) -> torch.Tensor:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        return state["momentum_buffer"]


def _by_shape(parameters: Sequence[torch.Tensor]) -> dict[torch.Size, list[torch.Tensor]]:
    """Those that have a gradient."""
    groups: dict[torch.Size, list[torch.Tensor]] = defaultdict(list)
    for parameter in parameters:
        if parameter.grad is not None:
            groups[parameter.shape].append(parameter)
    return groups


def orthogonal(
    matrices: torch.Tensor, coefficients: tuple[float, float, float], iterations: int, eps: float
) -> torch.Tensor:
    """The orthogonal matrices nearest to [n, rows, columns], roughly: bfloat16, singular values of 0.7 to 1.2.

    Newton and Schulz's iteration, of fifth order, on matrices scaled to a Frobenius norm of 1.
    """
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT.bfloat16() if tall else matrices.bfloat16()
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=eps)
    a, b, c = coefficients
    for _ in range(iterations):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x
