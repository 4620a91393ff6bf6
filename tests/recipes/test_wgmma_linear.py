"""Our float8 Linears for Hopper against float32: sizes that fill no tile, two streams, bounds as scales."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import recipes
from recipes import Recipe, RecipeError, attention, gemm_epilogues, wgmma_linear
from recipes.float8_linear import Float8Linear

CUDA = torch.device("cuda")
RECIPE = Recipe(
    dtype="bfloat16", fused_qkv=True, quantization="float8_per_row", fused_kernels=True, attention="wgmma_fp8"
)


def rows_to_float8(x: Tensor) -> tuple[Tensor, Tensor]:
    scale = x.abs().amax(dim=-1, keepdim=True).clamp(min=1e-12) / 448
    return (x / scale).to(torch.float8_e4m3fn), scale


class Layer(torch.nn.Module):
    """A Float8Linear and one stream of its input, of these sizes; `loud` times the input."""

    def __init__(self, rows: int, columns: int, depth: int, plain: int, batch: int = 1, seed: int = 0, loud: float = 1):
        super().__init__()
        random = torch.Generator().manual_seed(seed)
        x, weight = (torch.randn(*shape, generator=random) for shape in ((batch, rows, depth), (columns, depth)))
        x = loud * x * (0.1 + torch.rand(batch, rows, 1, generator=random))
        self.values, self.scale = rows_to_float8(x)
        self.norm = (self.values.float() * self.scale).norm(dim=-1, keepdim=True)
        linear = torch.nn.Linear(columns, depth)  # only what Float8Linear takes of it
        linear.weight = torch.nn.Parameter(torch.zeros(columns, depth))
        linear.weight.qdata, linear.weight.scale = rows_to_float8(weight / depth**0.5)  # type: ignore[attr-defined]
        bias = (torch.randn(columns, generator=random) / 4).bfloat16()
        linear.bias = torch.nn.Parameter(bias, requires_grad=False)
        self.linear = Float8Linear(linear)
        self.linear.bound(plain)

    def exact(self, device: torch.device) -> Tensor:
        """x W^T + b of what was rounded, in float32."""
        x, weight = self.values.double() * self.scale, self.linear.weight.double() * self.linear.weight_scale
        return (x @ weight.T + self.linear.bias.double()).float().to(device)

    def arguments(self, device: torch.device = CUDA) -> tuple:
        linear = self.linear
        of_linear = linear.weight, linear.weight_scale, linear.bias, linear.bounds
        return tuple(part.detach().to(device) for part in (self.values, self.scale, self.norm, *of_linear))


def gelu(x: Tensor) -> Tensor:
    return torch.nn.functional.gelu(x, approximate="tanh")


def test_bounds_are_of_the_columns_they_are_for() -> None:
    layer = Layer(5, 448, 256, plain=192)
    exact = layer.exact(torch.device("cpu"))[0]
    assert layer.linear.bounds is not None
    length, bias, value_length, value_bias = layer.linear.bounds
    assert (exact[:, 192:].abs() <= layer.norm[0] * length + bias).all()
    assert (exact[:, 128:192].abs() <= layer.norm[0] * value_length + value_bias).all()
    rows = (layer.linear.weight.float() * layer.linear.weight_scale).norm(dim=1)
    assert (length, value_length) == (rows[192:].max(), rows[128:192].max())
    assert (bias, value_bias) == tuple(
        layer.linear.bias[part].float().abs().max() for part in (slice(192, None), slice(128, 192))
    )


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ((448, 256, 192), None),
        ((256, 256, 192), None),
        ((256, 256, 256), "256 out features, of which 256 without GELU, aren't multiples of 64 and 192"),
        ((448, 200, 0), "200 in features aren't a multiple of 128 from 256 on"),
        ((448, 128, 0), "128 in features aren't a multiple of 128 from 256 on"),
        ((400, 256, 0), "400 out features, of which 0 without GELU, aren't multiples of 64 and 192"),
        ((448, 256, 128), "448 out features, of which 128 without GELU, aren't multiples of 64 and 192"),
    ],
)
def test_sizes_that_it_takes(sizes: tuple[int, int, int], words: str | None) -> None:
    assert wgmma_linear.refusal(*sizes) == words


def pipeline(heads: int, head_dim: int) -> Any:
    """As much of one as its sizes are asked of."""
    config = SimpleNamespace(num_attention_heads=heads, attention_head_dim=head_dim)
    return SimpleNamespace(transformer=SimpleNamespace(config=config))


def test_a_transformer_of_other_sizes_is_refused() -> None:
    unfit = gemm_epilogues.OPTIMIZATION.unfit
    assert unfit(RECIPE, pipeline(24, 128)) is None
    assert unfit(RECIPE, pipeline(2, 128)) is None
    reason = unfit(RECIPE, pipeline(1, 128))
    assert reason == "needs other sizes: 128 in features aren't a multiple of 128 from 256 on"
    unfit = attention.OPTIMIZATION.unfit
    assert unfit(RECIPE, pipeline(2, 128)) is None
    assert unfit(RECIPE, pipeline(4, 64)) == "needs heads of 128 values, this transformer's have 64"
    assert unfit(replace(RECIPE, attention="native"), pipeline(4, 64)) is None


@pytest.mark.parametrize("outliers", [1, 10])
def test_what_a_bound_as_scale_costs(outliers: float, error_of: Callable) -> None:
    """Of GELU's results, and of an attention that gives a twentieth of the values: float8 has room below a bound, also
    where one row and one column are ten times as long as the others."""
    layer = Layer(300, 7 * 256, 256, plain=3 * 256)
    linear = layer.linear
    for column in (700, 900):  # of the values and of the MLP
        linear.weight_scale.data[column] *= outliers
    layer.scale[0, 7] *= outliers
    layer.norm[0, 7] *= outliers
    linear.bound(3 * 256)
    assert linear.bounds is not None
    exact = layer.exact(torch.device("cpu"))
    bound = torch.maximum(
        layer.norm * linear.bounds[0] + linear.bounds[1], layer.norm.max() * linear.bounds[2] + linear.bounds[3]
    )
    scale = bound / 448  # as the kernel has it
    values = exact[..., 512:768]
    assert (values.abs() <= bound).all()
    for result in (gelu(exact[..., 768:]), values / 20):
        rounded = (result / scale).to(torch.float8_e4m3fn).float() * scale
        assert error_of(rounded, result) < 0.03


def test_what_it_needs_of_the_recipe(pretend_gpu: Callable) -> None:
    for name, value in (("fused_kernels", False), ("quantization", "none"), ("attention", "cudnn_fp8")):
        with pytest.raises(RecipeError, match=f"gemm_epilogues needs {name}="):
            replace(RECIPE, **{name: value}, gemm_epilogues=True)
    recipe = replace(RECIPE, gemm_epilogues=True)
    assert all(not recipe.without(name).gemm_epilogues for name in ("fused_kernels", "quantization", "attention"))
    pretend_gpu((10, 0), "a B200")
    refusal = recipes.refusal(recipe, CUDA)
    assert refusal is not None
    assert "needs compute capability 9.0 to below 10.0, a B200 has 10.0" in refusal


gpu = pytest.mark.gpu


@pytest.fixture
def _here() -> None:
    if (refusal := recipes.refusal(RECIPE, CUDA)) is not None:
        pytest.skip(refusal)


# The larger ones are several tiles a multiprocessor, so that one's epilogue runs under the next one's products: of few
# and of many blocks of depth, at the number of portions and next to it, with columns that fill no tile.
SIZES = [
    *((1, 192, 256), (77, 256, 256), (128, 448, 384), (200, 1024, 1792), (4608, 3072, 3072), (300, 12288, 3072)),
    *((4700, 448, 256), (4700, 448, 1536), (4700, 448, 1664), (4700, 512, 1792)),
]


@gpu
@pytest.mark.usefixtures("_here")
@pytest.mark.parametrize(("rows", "columns", "depth"), SIZES)
@pytest.mark.parametrize("loud", [1e-3, 1.0, 30.0])
def test_gelu_of_two_streams(rows: int, columns: int, depth: int, loud: float, error_of: Callable) -> None:
    layers = Layer(rows, columns, depth, 0, batch=2, loud=loud), Layer(130, columns, depth, 0, seed=1, loud=loud)
    out = wgmma_linear.wgmma_gelu_linears(*(part for layer in layers for part in layer.arguments()))
    for values, scale, layer in ((*out[:2], layers[0]), (*out[2:], layers[1])):
        exact = gelu(layer.exact(CUDA))
        assert (values.float().abs() < 448).all(), "nothing was cut off"
        # As exact as any rounding to float8, of 0.0265 on average; that of few values, or rows alike, is within 0.03.
        assert error_of(values.float() * scale, exact) < 0.03


@gpu
@pytest.mark.usefixtures("_here")
@pytest.mark.parametrize(
    ("rows", "columns", "depth", "plain", "beside"),
    [
        *((200, 1792, 256, 768, 256), (4608, 21504, 3072, 9216, 3072)),
        *((5, 256, 256, 192, 64), (20000, 448, 256, 192, 64)),
    ],
)
def test_query_key_value_and_mlp(
    rows: int, columns: int, depth: int, plain: int, beside: int, error_of: Callable
) -> None:
    layer = Layer(rows, columns, depth, plain)
    exact = layer.exact(CUDA)
    projected, values, scale = wgmma_linear.wgmma_qkv_gelu_linear(*layer.arguments(), plain, beside)
    assert (projected.shape[-1], values.shape[-1]) == (plain, beside + columns - plain)
    # bfloat16 rounds by 0.0017 on average; Hopper's tensor cores cut off what they add up in float8.
    assert error_of(projected.float(), exact[..., :plain]) < 0.004
    activated = gelu(exact[..., plain:])
    assert error_of(values[..., beside:].float() * scale, activated) < 0.03
    assert (exact[..., plain * 2 // 3 : plain].abs().amax() <= 448 * scale).all(), "the attention's result fits in"


@gpu
@pytest.mark.usefixtures("_here")
def test_same_bits_every_time() -> None:
    arguments = Layer(4608, 21504, 3072, 9216).arguments()
    first = wgmma_linear.wgmma_qkv_gelu_linear(*arguments, 9216, 3072)
    for _ in range(5):
        again = wgmma_linear.wgmma_qkv_gelu_linear(*arguments, 9216, 3072)
        assert torch.equal(again[0], first[0])
        assert torch.equal(again[2], first[2])
        assert torch.equal(again[1][..., 3072:].view(torch.uint8), first[1][..., 3072:].view(torch.uint8))


def test_refuses_what_it_would_read_wrongly() -> None:
    rows, scale, norm, *layer = Layer(5, 192, 256, 0).arguments(torch.device("cpu"))
    with pytest.raises(ValueError, match=r"norm is to be \[1, 5, 1\] torch.float32, contiguous, not \[1, 4, 1\]"):
        wgmma_linear.wgmma_qkv_gelu_linear(rows, scale, norm[:, :4], *layer, 0, 0)
    with pytest.raises(ValueError, match=r"x is to be \[1, 5, 256\] torch.float8_e4m3fn, contiguous, not"):
        wgmma_linear.wgmma_qkv_gelu_linear(rows.float(), scale, norm, *layer, 0, 0)
    with pytest.raises(ValueError, match="192 out features, of which 128 without GELU, aren't multiples of 64 and 192"):
        wgmma_linear.wgmma_qkv_gelu_linear(rows, scale, norm, *layer, 128, 0)
    with pytest.raises(ValueError, match="8 columns beside the others aren't a multiple of 16"):
        wgmma_linear.wgmma_qkv_gelu_linear(rows, scale, norm, *layer, 0, 8)
    weight, weight_scale, bias, bounds = layer
    shifted = torch.cat([bias[:1], bias])[1:]
    with pytest.raises(ValueError, match="bias is read 16 bytes at once and has to begin at a multiple of that"):
        wgmma_linear.wgmma_qkv_gelu_linear(rows, scale, norm, weight, weight_scale, shifted, bounds, 0, 0)
