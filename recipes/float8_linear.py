"""A float8 Linear whose input comes quantized: the kernel before it has cast its rows already."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class Float8Linear(nn.Module):
    """A Linear quantized by torchao with a scale a row of weights, taking rows in float8.

    The weight and its scale stay where they are: nothing is copied.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        quantized: Any = linear.weight  # a torchao Float8Tensor
        self.weight = nn.Parameter(quantized.qdata, requires_grad=False)  # [out features, in features] float8_e4m3fn
        self.weight_scale = nn.Parameter(quantized.scale, requires_grad=False)  # [out features, 1] float32
        self.bias = linear.bias
        self.dtype = quantized.dtype

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
