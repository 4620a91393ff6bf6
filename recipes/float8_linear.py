"""A float8 Linear whose input comes quantized: the kernel before it has cast its rows already."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class Float8Linear(nn.Module):
    """A Linear quantized by torchao with a scale a row of weights, taking rows in float8.

    The weight and its scale stay where they are: nothing is copied. bounds: see `bound`.
    """

    bounds: nn.Parameter | None

    def __init__(self, linear: nn.Linear):
        super().__init__()
        quantized: Any = linear.weight  # a torchao Float8Tensor
        self.weight = nn.Parameter(quantized.qdata, requires_grad=False)  # [out features, in features] float8_e4m3fn
        self.weight_scale = nn.Parameter(quantized.scale, requires_grad=False)  # [out features, 1] float32
        self.bias = linear.bias
        self.dtype = quantized.dtype
        self.register_parameter("bounds", None)

    def bound(self, plain: int) -> None:
        """Keep in `bounds` its weight's largest row norms, and biases; `plain` features don't go through GELU."""
        self.plain = plain
        self.bounds = nn.Parameter(self.bounds_of(self.weight, self.weight_scale), requires_grad=False)

    def bounds_of(self, weight: torch.Tensor, weight_scale: torch.Tensor) -> torch.Tensor:
        """The largest norm of this weight's rows and the largest bias: of the features from `plain` on, and of the
        attention's values, the last third of those before. [4] float32."""
        found = []
        for part in (slice(self.plain, None), slice(self.plain * 2 // 3, self.plain)):
            norms = (weight[part].float() * weight_scale[part]).norm(dim=1)
            biases = self.bias[part].float().abs()
            found += [x.amax() if len(x) else x.new_zeros(()) for x in (norms, biases)]
        return torch.stack(found)

    def forward(self, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """x [batch, tokens, in features] float8_e4m3fn, scale [batch, tokens, 1] float32."""
        out = torch._scaled_mm(
            x.flatten(0, 1),
            self.weight.t(),
            scale_a=scale.flatten(0, 1),
            scale_b=self.weight_scale.t(),
            bias=self.bias,
            out_dtype=self.dtype,
            use_fast_accum=True,
        )
        return out.unflatten(0, x.shape[:2])
