"""A transformer's weights as a recipe left them: which of the checkpoint's each holds, and writing it in place.

In place, because compiled code, packages and CUDA graphs read a weight where it lies.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from recipes import float8, fused_kernels, fused_qkv
from recipes.quantized_linear import QuantizedLinear

_SEPARATE = {**fused_qkv.SEPARATE, **fused_kernels.SEPARATE}


@dataclass(frozen=True)
class Weight:
    """The weight [out features, in features] of `module`, a Linear or what a recipe put in its place.

    layers: the checkpoint's Linears whose rows it has, in their order; one, unless projections were fused.
    quantization: as `float8.quantize` takes it.
    """

    module: Any
    layers: tuple[str, ...]
    quantization: str

    @property
    def dtype(self) -> torch.dtype:
        """What it had, or has, before it was quantized."""
        return self.module.dtype if isinstance(self.module, QuantizedLinear) else self.module.weight.dtype

    @property
    def stored(self) -> tuple[torch.Tensor, ...]:
        """The tensors that hold it: itself, or quantized values and scale, and what is kept of these."""
        if isinstance(self.module, QuantizedLinear):
            kept = () if self.module.bounds is None else (self.module.bounds,)
            return self.module.weight, self.module.weight_scale, *kept
        weight = self.module.weight
        return (weight.qdata, weight.scale) if _is_quantized(weight) else (weight,)

    def written(self, plain: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """`plain` [out features, in features], of `dtype`, as `stored` would hold it.

        Raises:
            RecipeError: the recipe's kernels have no room for it.
        """
        if len(self.stored) == 1:
            return (plain,)
        quantized = float8.quantize(plain, self.quantization)
        if isinstance(self.module, QuantizedLinear):
            self.module.check(quantized.scale)
        if len(self.stored) == 2:
            return quantized.qdata, quantized.scale
        return quantized.qdata, quantized.scale, self.module.bounds_of(quantized.qdata, quantized.scale)

    def holds(self, plain: torch.Tensor) -> bool:
        """Whether its value is `plain`, bit for bit. What is kept of quantized values and scale follows from them."""
        pairs = zip(self.stored[:2], self.written(plain)[:2], strict=True)
        return all(a.shape == b.shape and torch.equal(_bytes(a), _bytes(b).to(a.device)) for a, b in pairs)

    def write(self, plain: torch.Tensor) -> None:
        with torch.no_grad():
            for old, new in zip(self.stored, self.written(plain), strict=True):
                old.copy_(new)


def weights(transformer: nn.Module, quantization: str) -> list[Weight]:
    """The weights of all of a transformer's Linears; `quantization`: that of the recipe applied to it."""
    found = []
    for name, module in transformer.named_modules():
        if isinstance(getattr(module, "weight", None), nn.Parameter) and module.weight.ndim == 2:
            owner, _, leaf = name.rpartition(".")
            layers = tuple(f"{owner}.{part}" for part in _SEPARATE[leaf]) if leaf in _SEPARATE else (name,)
            in_int8 = getattr(module.weight, "qdata", module.weight).dtype == torch.int8
            found.append(Weight(module, layers, "int8_per_row" if in_int8 else quantization))
    return found


def _is_quantized(weight: torch.Tensor) -> bool:
    return hasattr(weight, "qdata")


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().flatten().view(torch.uint8)
