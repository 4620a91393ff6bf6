"""A Linear in float8 or int8 whose input comes quantized: the kernel before it has cast its rows already."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from recipes.float8_heads import SMALLEST_AMAX
from recipes.recipe import RecipeError

# How long a row of its input, and one of its weight, may be in float8: no sum of products of theirs exceeds 28672, by
# Cauchy and Schwarz, and a float16 holds 65504. What lies between is for rounding: of both to float8 (18/17 at most),
# of an attention's probabilities, of whose sum the tensor cores cut off some 2 % at most (1.36 is what it took when
# they were added up before they were rounded), and of the sum on its way (1.2).
ROW, WEIGHT_ROW = 448, 64
INT8_MAX = 127  # -128 is left out, as by every symmetric quantization


def weight_to_float8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """weight [out features, in features] as float8_e4m3fn, each row `WEIGHT_ROW` long, and its scale [out features, 1]
    float32. It loses nothing beside a scale by the largest value: float8 is a floating-point format."""
    # In float64, of which a float32 is the same on every GPU, in whatever order it adds up.
    norm = torch.linalg.vector_norm(weight, dim=1, keepdim=True, dtype=torch.float64).float()
    scale = norm.clamp(min=SMALLEST_AMAX) / WEIGHT_ROW
    return (weight / scale).to(torch.float8_e4m3fn), scale


def weight_to_int8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """weight [out features, in features] as int8, the largest of each row `INT8_MAX`, and its scale [out features, 1]
    float32."""
    scale = weight.float().abs().amax(dim=1, keepdim=True).clamp(min=SMALLEST_AMAX) / INT8_MAX
    return (weight.float() / scale).round().to(torch.int8), scale


class QuantizedLinear(nn.Module):
    """A Linear quantized by torchao with a scale a row of weights, taking rows in the weight's float8 or int8.

    The weight and its scale stay where they are: nothing is copied. bounds: see `bound`. By itself it takes float8
    only; of int8 it is `wgmma_linear`'s operators that multiply.
    """

    bounds: nn.Parameter | None
    limited: str | None = None  # its name, if `limit` was called

    def __init__(self, linear: nn.Linear):
        super().__init__()
        quantized: Any = linear.weight  # a torchao Float8Tensor or Int8Tensor
        self.weight = nn.Parameter(quantized.qdata, requires_grad=False)  # [out features, in features]
        self.weight_scale = nn.Parameter(quantized.scale, requires_grad=False)  # [out features, 1] float32
        self.bias = linear.bias
        self.dtype = quantized.dtype
        self.register_parameter("bounds", None)

    def bound(self, heads: int, head_dim: int) -> None:
        """Keep in `bounds` what its results can't exceed. They begin with query, key and value of `heads`; the features
        after these go through GELU."""
        self.heads, self.plain = heads, 3 * heads * head_dim
        self.bounds = nn.Parameter(self.bounds_of(self.weight, self.weight_scale), requires_grad=False)

    def bounds_of(self, weight: torch.Tensor, weight_scale: torch.Tensor) -> torch.Tensor:
        """A row of results is no longer than the first of these times the input row's norm, plus the second: of the
        features that go through GELU. The same of the attention's values: each head may take another row's. [4]
        float32.
        """
        found = []
        for part, heads in ((slice(self.plain, None), 1), (slice(self.plain * 2 // 3, self.plain), self.heads)):
            norm = weight_scale.new_zeros(())
            if self.bias[part].numel():
                norm = longest_result((weight[part].float() * weight_scale[part]).unflatten(0, (heads, -1))).norm()
            found += [norm, self.bias[part].float().norm()]
        return rounded_up(torch.stack(found))

    def limit(self, name: str) -> None:
        """Hold rows of its weight in float8 to `WEIGHT_ROW`, of one that is written later as well: where a kernel
        multiplies sums by the weight's scale in float16, they may be nearly as large as one, and aren't to grow."""
        self.limited = name
        self.check(self.weight_scale)

    def check(self, weight_scale: torch.Tensor) -> None:
        """weight_scale [out features, 1], of `weight_to_float8`.

        Raises:
            RecipeError: it is limited, and a row of the weight is longer; FLUX.1's have no reason to be.
        """
        if self.limited is not None and (largest := weight_scale.max().item()) > 1:
            norm = WEIGHT_ROW * largest
            raise RecipeError(
                f"gemm_epilogues=true can't take {self.limited} with a row of weights of norm {norm:.0f}, above "
                f"{WEIGHT_ROW}: load the pipeline again with gemm_epilogues=false, or a LoRA at a smaller scale"
            )

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


def longest_result(weight: torch.Tensor) -> torch.Tensor:
    """No less than |W x| of any x of norm 1: weight [..., out features, in features] float32; [...] float32.

    That is W's largest singular value, the root of W W^T's largest eigenvalue, which the eigenvalues' norm of order 8
    exceeds by little: of normal numbers 1.3 times, if all singular values are alike 1.7. An exact one takes minutes for
    FLUX.1's weights.
    """
    wide = weight.shape[-2] < weight.shape[-1]
    squared = weight @ weight.mT if wide else weight.mT @ weight
    trace = squared.diagonal(dim1=-2, dim2=-1).sum(-1).clamp(min=torch.finfo(weight.dtype).tiny)
    power = squared / trace[..., None, None]
    for _ in range(2):
        power = power @ power
    of_eigenvalues = trace * torch.linalg.matrix_norm(power) ** 0.25
    return of_eigenvalues.sqrt() * 1.01  # whatever precision products in float32 are told to have


def rounded_up(x: torch.Tensor) -> torch.Tensor:
    """x, positive or zero, to the next of 16 numbers between a power of two and the next: nearly always the same bits
    however it was added up."""
    mantissa, exponent = torch.frexp(x)
    return torch.ldexp((mantissa * 32).ceil() / 32, exponent)
