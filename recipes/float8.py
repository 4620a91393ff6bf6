"""Dynamic float8 activations and float8 weights (e4m3) for the Linears of the transformer's blocks, through torchao;
with `int8_adaln` some of them in int8.

Through `Float8Tensor` itself: torchao's configuration would refuse a CPU, where it is right, only slow, and turns
coordinate descent on for the whole process (`set_inductor_config`).

Only the blocks' attention and feed-forward projections: the embedders, the AdaLN modulation and the output layers act
on few tokens or set the scale of everything, and stay as they are."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

from recipes.int8_adaln import takes_int8
from recipes.optimization import Needs, Optimization
from recipes.quantized_linear import weight_to_float8, weight_to_int8
from recipes.recipe import Recipe, RecipeError
from utils.device_memory import give_back_memory

_BLOCKS = ("transformer_blocks.", "single_transformer_blocks.")
_MODULATION = ("norm1.linear", "norm1_context.linear", "norm.linear")


def is_quantized(module: nn.Module, name: str) -> bool:
    """Whether the submodule `name` of the transformer is one of the Linears that are quantized."""
    return isinstance(module, nn.Linear) and name.startswith(_BLOCKS) and not name.endswith(_MODULATION)


def quantized_linears(transformer: nn.Module) -> dict[str, nn.Linear]:
    """The transformer's Linears that are quantized, by name."""
    return {n: m for n, m in transformer.named_modules() if is_quantized(m, n) and isinstance(m, nn.Linear)}


def _check_shapes(linears: dict[str, nn.Linear]) -> None:
    """torchao takes a weight for blockwise scaled if one scale covers 128 x 128 values, as here the whole of it.

    (torchao/float8/inference.py, `_is_128_128_scaled`.) FLUX.1 has none of that shape.
    """
    for name, linear in linears.items():
        if linear.weight.shape == (128, 128):
            raise RecipeError(
                f"quantization=float8_per_tensor can't take {name}, a 128 x 128 weight, which torchao would read as "
                "blockwise scaled: load the pipeline again and use float8_per_row"
            )


def needs(quantization: str) -> Needs:
    """A scale a row asks more of torch._scaled_mm than one for all rows, which any CPU and any dtype can have.

    Before PyTorch 2.12 a CPU can't have it. On a GPU the result is bfloat16: CUTLASS's kernel gives nothing else, and
    cuBLAS's, from CUDA 12.9 on, takes scales a row on compute capability 9.0 alone (native/cuda/ScaledBlas.cpp).
    """
    if quantization == "float8_per_tensor":
        return Needs(capability=(8, 9), packages=("torchao",))
    return Needs(capability=(8, 9), dtype_on_cuda="bfloat16", torch_on_cpu=(2, 12), packages=("torchao",))


def not_timed(device: torch.device) -> str | None:
    return "float8 on a CPU is emulated: right, but its time says nothing" if device.type == "cpu" else None


def quantize(weight: torch.Tensor, quantization: str) -> Any:
    """weight [out features, in features] as a torchao Float8Tensor: `qdata` float8_e4m3fn of its shape, `scale` float32
    [out features, 1] (float8_per_row) or [1, 1] (float8_per_tensor). A Linear with it casts its input likewise. Or, of
    int8_per_row, as an Int8Tensor, a scale a row.

    Rows with scales of their own are scaled by `quantized_linear.weight_to_float8`, not to the largest float8.
    """
    if quantization == "int8_per_row":
        return _to_int8(weight)
    from torchao.float8.inference import Float8MMConfig
    from torchao.quantization import Float8Tensor, PerRow, PerTensor
    from torchao.quantization.quantize_.common import KernelPreference
    from torchao.quantization.quantize_.workflows import QuantizeTensorToFloat8Kwargs

    granularity = PerRow() if quantization == "float8_per_row" else PerTensor()
    # TORCH: plain torch._scaled_mm, which has a CPU path and which torch.export and Inductor know.
    kernel = KernelPreference.TORCH
    options: dict[str, Any] = {
        "mm_config": Float8MMConfig(use_fast_accum=True),
        "kernel_preference": kernel,
        "act_quant_kwargs": QuantizeTensorToFloat8Kwargs(granularity=granularity, kernel_preference=kernel),
    }
    if quantization == "float8_per_tensor":
        return Float8Tensor.from_hp(weight, granularity=granularity, **options)
    values, scale = weight_to_float8(weight)
    return Float8Tensor(values, scale, block_size=[1, weight.shape[1]], dtype=weight.dtype, **options)


def _to_int8(weight: torch.Tensor) -> Any:
    from torchao.quantization import Int8Tensor, PerRow
    from torchao.quantization.quantize_.workflows import QuantizeTensorToInt8Kwargs

    values, scale = weight_to_int8(weight)
    activations = QuantizeTensorToInt8Kwargs(granularity=PerRow())
    return Int8Tensor(values, scale, [1, weight.shape[1]], weight.dtype, act_quant_kwargs=activations)


def quantize_linears(linears: Iterable[nn.Linear], quantization: str) -> None:
    """Weights to `quantization` in place; activations follow at each call."""
    for linear in linears:
        linear.weight = nn.Parameter(quantize(linear.weight.detach(), quantization), requires_grad=False)
        give_back_memory(linear.weight.device)


def _apply(pipe: DiffusionPipeline, recipe: Recipe) -> str:
    linears = quantized_linears(pipe.transformer)
    if recipe.quantization == "float8_per_tensor":
        _check_shapes(linears)
    in_int8 = {name: linear for name, linear in linears.items() if takes_int8(recipe, name)}
    in_float8 = {name: linear for name, linear in linears.items() if name not in in_int8}
    quantize_linears(in_float8.values(), recipe.quantization)
    quantize_linears(in_int8.values(), "int8_per_row")
    return f"{recipe.quantization}, {len(in_float8)} Linears"


OPTIMIZATION = Optimization(
    field="quantization",
    needs=lambda recipe: needs(recipe.quantization),
    lossless=lambda recipe: False,
    apply=_apply,
    not_timed=not_timed,
    merges_weights=lambda recipe: True,
)
