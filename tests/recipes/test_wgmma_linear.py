"""Our quantized Linears for Hopper against float32: sizes that fill no tile, two streams, bounds as scales."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_flux import FluxPosEmbed
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import recipes
from recipes import Recipe, RecipeError, attention, gemm_epilogues, wgmma_linear
from recipes.float8_heads import LONGEST, for_wgmma
from recipes.kernels import cuda_kernel
from recipes.quantized_linear import (
    ROW,
    WEIGHT_ROW,
    QuantizedLinear,
    longest_result,
    rounded_up,
    weight_to_float8,
    weight_to_int8,
)

CUDA = torch.device("cuda")
RECIPE = Recipe(
    dtype="bfloat16", fused_qkv=True, quantization="float8_per_row", fused_kernels=True, attention="wgmma_fp8"
)


class Layer(torch.nn.Module):
    """A QuantizedLinear, which begins with query, key and value of so many heads, and one stream of its input, of these
    sizes; `loud` times the input. In `dtype`, float8_e4m3fn or int8."""

    def __init__(
        self,
        rows: int,
        columns: int,
        depth: int,
        heads: int,
        batch: int = 1,
        seed: int = 0,
        loud: float = 1,
        dtype: torch.dtype = torch.float8_e4m3fn,
    ):
        super().__init__()
        random = torch.Generator().manual_seed(seed)
        x, weight = (torch.randn(*shape, generator=random) for shape in ((batch, rows, depth), (columns, depth)))
        x = loud * x * (0.1 + torch.rand(batch, rows, 1, generator=random))
        in_int8 = dtype == torch.int8
        self.scale = x.abs().amax(dim=-1, keepdim=True) / 127 if in_int8 else x.norm(dim=-1, keepdim=True) * 1.065 / ROW
        self.values = (x / self.scale).round().to(dtype) if in_int8 else (x / self.scale).to(dtype)
        cast = weight_to_int8 if in_int8 else weight_to_float8
        linear = torch.nn.Linear(columns, depth)  # only what QuantizedLinear takes of it
        linear.weight = torch.nn.Parameter(torch.zeros(columns, depth))
        linear.weight.qdata, linear.weight.scale = cast(weight / depth**0.5)  # type: ignore[attr-defined]
        bias = (torch.randn(columns, generator=random) / 4).bfloat16()
        linear.bias = torch.nn.Parameter(bias, requires_grad=False)
        self.linear = QuantizedLinear(linear)
        self.linear.bound(heads, 128)

    @property
    def norm(self) -> Tensor:
        """What the kernel takes for the rows' norms [batch, rows, 1]."""
        in_int8 = self.values.dtype == torch.int8
        return (self.values.float().norm(dim=-1, keepdim=True) * 1.001 if in_int8 else ROW) * self.scale

    def exact(self, device: torch.device) -> Tensor:
        """x W^T + b of what was rounded, in float32."""
        x, weight = self.values.double() * self.scale, self.linear.weight.double() * self.linear.weight_scale
        return (x @ weight.T + self.linear.bias.double()).float().to(device)

    def arguments(self, device: torch.device = CUDA) -> tuple:
        linear = self.linear
        norm = self.norm if self.values.dtype == torch.int8 else None
        parts = self.values, self.scale, norm, linear.weight, linear.weight_scale, linear.bias, linear.bounds
        return tuple(part if part is None else part.detach().to(device) for part in parts)


def gelu(x: Tensor) -> Tensor:
    return torch.nn.functional.gelu(x, approximate="tanh")


def test_bounds_are_of_the_columns_they_are_for() -> None:
    """Of GELU's rows, and of what an attention makes of the values if each head takes another row's."""
    layer = Layer(5, 3 * 256 + 448, 256, heads=2)
    linear, exact, norm = layer.linear, layer.exact(torch.device("cpu"))[0], layer.norm[0]
    assert linear.bounds is not None
    length, bias, value_length, value_bias = linear.bounds
    assert (exact[:, 768:].norm(dim=1, keepdim=True) <= norm * length + bias).all()
    of_heads = exact[:, 512:768].unflatten(1, (2, 128)).norm(dim=2)
    assert of_heads.amax(dim=0).norm() <= norm.max() * value_length + value_bias
    torch.testing.assert_close(bias, linear.bias[768:].float().norm(), rtol=1 / 16, atol=0)
    torch.testing.assert_close(value_bias, linear.bias[512:768].float().norm(), rtol=1 / 16, atol=0)
    weight = linear.weight.float() * linear.weight_scale
    torch.testing.assert_close(length, torch.linalg.matrix_norm(weight[768:], 2), rtol=0.5, atol=0)
    of_values = torch.linalg.matrix_norm(weight[512:768].unflatten(0, (2, 128)), 2).norm()
    torch.testing.assert_close(value_length, of_values, rtol=0.5, atol=0)


@pytest.mark.parametrize("shape", [(40, 90), (90, 40), (3, 64, 64)])
@pytest.mark.parametrize("stretched", [0.0, 30.0])
def test_longest_result(shape: tuple[int, ...], stretched: float) -> None:
    random = torch.Generator().manual_seed(0)
    weight = 1e-3 * torch.randn(*shape, generator=random)
    weight += stretched * weight[..., :, :1] * weight[..., :1, :] / weight[..., :1, :1]
    exact, bound = torch.linalg.matrix_norm(weight.double(), 2).float(), longest_result(weight)
    assert (bound >= exact).all()
    assert (bound <= 1.35 * exact).all()
    assert (longest_result(0 * weight) < 1e-15).all()


def test_rounded_up() -> None:
    x = torch.tensor([0, 1, 1.0001, 0.06251, 3.9, 1e-9, 447.9])
    out = rounded_up(x)
    assert (out >= x).all()
    assert (out <= x * (1 + 1 / 16)).all()
    assert torch.equal(rounded_up(out), out)
    assert torch.equal(rounded_up(x[2:] * (1 - 1e-6)), out[2:]), "however it was added up"


def test_no_sum_exceeds_a_float16() -> None:
    """Nor does one on the way to it, of rows that are as long as they may be."""
    x = torch.zeros(4, 4096)
    x[0, 7], x[1], x[2, :9] = 3.0, 17 / 16 + 1e-3, torch.arange(9) - 4.0
    x[3] = torch.randn(4096, generator=torch.Generator().manual_seed(0)).exp()
    weight, _ = weight_to_float8(x)
    norms = weight.float().norm(dim=1)
    # What the kernel makes itself is rounded, of the sum of an attention's probabilities something is cut off, and sums
    # are rounded: for each 32 of depth here, and so more often than the kernel does it.
    of_x = ROW * (18 / 17) ** 2 * 1.36
    assert of_x * norms.max() * (1 + 15360 / 32 / 2048) < torch.finfo(torch.float16).max
    assert (norms > 0.9 * WEIGHT_ROW).all()


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ((448, 256, 1), None),
        ((384, 256, 1), None),
        ((320, 256, 1), "320 out features aren't a multiple of 64, or fewer than 1 heads of 128 have"),
        ((448, 200, 0), "200 in features aren't a multiple of 128 from 256 on"),
        ((448, 128, 0), "128 in features aren't a multiple of 128 from 256 on"),
        ((400, 256, 0), "400 out features aren't a multiple of 64, or fewer than 0 heads of 128 have"),
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
    layer = Layer(300, 7 * 256, 256, heads=2)
    linear = layer.linear
    for column in (700, 900):  # of the values and of the MLP
        linear.weight_scale.data[column] *= outliers
    layer.scale[0, 7] *= outliers
    linear.bound(2, 128)
    assert linear.bounds is not None
    exact = layer.exact(torch.device("cpu"))
    norm = layer.norm
    of_values = norm.max() * linear.bounds[2] + linear.bounds[3]
    bound = torch.hypot(norm * linear.bounds[0] + linear.bounds[1], of_values)
    scale = bound / 448  # as the kernel has it
    values = exact[..., 512:768]
    assert (values.abs() <= bound).all()
    for result in (gelu(exact[..., 768:]), values / 20):
        rounded = (result / scale).to(torch.float8_e4m3fn).float() * scale
        assert error_of(rounded, result) < 0.03


def test_rows_of_weights_that_sums_in_float16_have_no_room_for() -> None:
    transformer: Any = torch.nn.Module()
    transformer.transformer_blocks = transformer.single_transformer_blocks = torch.nn.ModuleList()
    transformer.proj_out = Layer(1, 4, 256, 0).linear
    gemm_epilogues.arrange(transformer)
    transformer.proj_out.weight_scale.data[2] *= 100 / (WEIGHT_ROW * transformer.proj_out.weight_scale[2].item())
    words = r"gemm_epilogues=true can't take proj_out with a row of weights of norm 100, above 64: load .* again with"
    with pytest.raises(RecipeError, match=words):
        gemm_epilogues.arrange(transformer)


def test_int8_adaln_needs_gemm_epilogues() -> None:
    with pytest.raises(RecipeError, match="int8_adaln needs gemm_epilogues=true"):
        replace(RECIPE, int8_adaln=True)
    recipe = replace(RECIPE, gemm_epilogues=True, int8_adaln=True)
    for name in ("dtype", "fused_qkv", "fused_kernels", "quantization", "attention", "gemm_epilogues"):
        assert not recipe.without(name).int8_adaln


def test_what_int8_costs(error_of: Callable) -> None:
    """A third of float8's rounding; exact sums of what was rounded."""
    layers = [Layer(300, 448, 3072, 0, dtype=dtype) for dtype in (torch.int8, torch.float8_e4m3fn)]
    in_int8, in_float8 = (layer.exact(torch.device("cpu")) for layer in layers)
    random = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(*shape, generator=random) for shape in ((1, 300, 3072), (448, 3072)))
    x *= 0.1 + torch.rand(1, 300, 1, generator=random)
    exact = x @ weight.T / 3072**0.5 + layers[0].linear.bias.float()
    assert error_of(in_int8, exact) < 0.014
    assert error_of(in_float8, exact) > 0.03


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


DTYPES = pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8], ids=["float8", "int8"])

# The larger ones are several tiles a multiprocessor, so that one's epilogue runs under the next one's products: of few
# and of many blocks of depth, at the number of pieces and next to it, with columns that fill no tile.
SIZES = [
    *((1, 192, 256), (77, 256, 256), (128, 448, 384), (200, 1024, 1792), (4608, 3072, 3072), (300, 12288, 3072)),
    *((4700, 448, 256), (4700, 448, 768), (4700, 448, 896), (4700, 512, 1792)),
]


@gpu
@pytest.mark.usefixtures("_here")
@pytest.mark.parametrize(("rows", "columns", "depth"), SIZES)
@pytest.mark.parametrize("loud", [1e-3, 1.0, 30.0])
@DTYPES
def test_gelu_of_two_streams(
    rows: int, columns: int, depth: int, loud: float, dtype: torch.dtype, error_of: Callable
) -> None:
    of_both = {"loud": loud, "dtype": dtype}
    layers = Layer(rows, columns, depth, 0, batch=2, **of_both), Layer(130, columns, depth, 0, seed=1, **of_both)
    out = wgmma_linear.wgmma_gelu_linears(*(part for layer in layers for part in layer.arguments()))
    for values, scale, layer in ((*out[:2], layers[0]), (*out[2:], layers[1])):
        exact = gelu(layer.exact(CUDA))
        assert (values.float().norm(dim=-1) <= 18 / 17 * ROW).all(), "nothing was cut off, and the next sums hold"
        # As exact as any rounding to float8, of 0.0265 on average; that of few values, or rows alike, is within 0.03.
        assert error_of(values.float() * scale, exact) < 0.03


def rotary(tokens: int) -> Tensor:
    """Cosines and sines [tokens, 128], on the GPU."""
    random = torch.Generator().manual_seed(2)
    angles = 10 * torch.randn(tokens, 64, generator=random).to(CUDA)
    return torch.stack([angles.cos(), angles.sin()], dim=-1).flatten(1).half()


def normed_and_turned(x: Tensor, weight: Tensor, turns: Tensor) -> Tensor:
    """x [batch, tokens, heads, 128], as diffusers norms and turns query and key."""
    x = torch.nn.functional.rms_norm(x, x.shape[-1:], weight.float(), 1e-6)
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = turns.float()[:, None].unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2)


def check_heads(
    parts: Tensor, query_key: Tensor, value: Tensor, descales: Tensor, weights: list, turns: Tensor, error_of: Callable
) -> None:
    """parts [batch, tokens, 3, heads, 128], exact; weights: of the streams query's and key's norms, the last of which
    `parts` are of."""
    batch, _, _, heads, _ = parts.shape
    for i in range(2):
        weight = weights[-1][i]
        expected = normed_and_turned(parts[:, :, i], weight, turns)
        largest = max(one[i].float().abs().max() for one in weights)
        torch.testing.assert_close(descales[i], (largest * 128**0.5 / LONGEST).expand(batch, heads))
        got = query_key[:, :, i].float()
        assert (got.norm(dim=-1) <= 17 / 16 * LONGEST).all(), "a score is a float16"
        # e4m3's rounding of any normal number, and of the smaller ones; and what the tensor cores cut off.
        allowed = expected.abs() * 2**-4 * 1.1 + descales[i, 0, 0] * 2**-10 * 1.1 + 0.02 * weight.float().abs().max()
        assert ((got * descales[i, 0, 0] - expected).abs() <= allowed).all()
        assert error_of(got * descales[i, 0, 0], expected) < 0.03
    assert (value.float().abs() < 448).all(), "nothing was cut off"
    assert error_of(value.float() * descales[2, 0, 0], parts[:, :, 2]) < 0.03


def by_token(value: Tensor, tokens: int) -> Tensor:
    """Values as `for_wgmma` lays them out, by [batch, tokens, heads, 128] again."""
    channels = value.view(torch.uint8).unflatten(2, (16, 4, 2)).transpose(2, 3).flatten(2, 4)
    of_tokens = channels.unflatten(-1, (-1, 4, 2, 2)).transpose(-3, -2).flatten(-4)
    assert not of_tokens[..., tokens:].any(), "zero beyond the tokens"
    return of_tokens[..., :tokens].permute(0, 3, 1, 2).contiguous().view(value.dtype)


def test_what_it_lays_out() -> None:
    assert wgmma_linear.lays_out(4096, 512)
    assert not wgmma_linear.lays_out(4096, 500)
    shapes = ShapeEnv()
    tokens = shapes.create_unbacked_symint()
    assert not wgmma_linear.lays_out(tokens)
    assert not shapes.guards


def test_by_token() -> None:
    value = torch.randn(2, 37, 3, 128, generator=torch.Generator().manual_seed(0)).to(torch.float8_e4m3fn)
    assert torch.equal(by_token(for_wgmma(value), 37).view(torch.uint8), value.view(torch.uint8))


def norm_weights(seed: int) -> Tensor:
    """Of query's and key's norms [2, 128]."""
    return torch.randn(2, 128, generator=torch.Generator().manual_seed(seed)).to(CUDA, torch.bfloat16)


@gpu
@pytest.mark.usefixtures("_here")
@pytest.mark.parametrize(
    ("batch", "tokens", "heads", "others", "depth"),
    [
        *(
            (1, 200, 2, 1024, 256),
            (2, 208, 3, 448, 256),
            (3, 16, 1, 64, 256),
            (2, 77, 3, 64, 256),
            (1, 5, 1, 448, 256),
            (1, 1, 1, 1024, 256),
        ),
        *((1, 4608, 24, 12288, 3072), (2, 4608, 1, 448, 1792), (1, 20000, 1, 64, 256)),
    ],
)
@DTYPES
def test_query_key_value_and_mlp(
    batch: int, tokens: int, heads: int, others: int, depth: int, dtype: torch.dtype, error_of: Callable
) -> None:
    plain = 3 * heads * 128
    layer = Layer(tokens, plain + others, depth, heads, batch=batch, dtype=dtype)
    exact = layer.exact(CUDA)
    weights, turns = norm_weights(3), rotary(tokens)
    query_key, value, descales, rows, scale = wgmma_linear.wgmma_qkv_gelu_linear(
        *layer.arguments(), *weights, turns, 1e-6, heads, laid_out := wgmma_linear.lays_out(tokens)
    )
    value = by_token(value, tokens) if laid_out else value
    parts = exact[..., :plain].unflatten(-1, (3, heads, 128))
    check_heads(parts, query_key, value, descales, [weights], turns, error_of)
    assert (scale >= descales[2, 0, 0]).all(), "the attention's result fits in"
    norm, bounds = layer.norm, layer.linear.bounds
    both = torch.hypot(norm * bounds[0] + bounds[1], norm.max() * bounds[2] + bounds[3])
    torch.testing.assert_close(scale, (both / ROW).to(CUDA))
    assert rows.shape == (batch, tokens, heads * 128 + others)
    assert error_of(rows[..., heads * 128 :].float() * scale, gelu(exact[..., plain:])) < 0.03


@gpu
@pytest.mark.usefixtures("_here")
@pytest.mark.parametrize(
    ("batch", "image", "text", "heads", "depth"),
    [
        (1, 200, 77, 2, 256),
        (2, 144, 32, 3, 256),
        (1, 144, 5, 1, 256),
        (2, 130, 5, 3, 256),
        (1, 4096, 512, 24, 3072),
        (2, 4096, 512, 2, 2688),
    ],
)
@DTYPES
def test_query_key_value_of_two_streams(
    batch: int, image: int, text: int, heads: int, depth: int, dtype: torch.dtype, error_of: Callable
) -> None:
    plain = 3 * heads * 128
    layers = [
        Layer(n, plain, depth, heads, batch=batch, seed=seed, dtype=dtype) for seed, n in enumerate((image, text))
    ]
    weights, turns = [norm_weights(3), norm_weights(4)], rotary(text + image)
    query_key, value, descales = wgmma_linear.wgmma_qkv_linears(
        *(*layers[0].arguments(), *layers[1].arguments(), *weights[0], *weights[1], turns, 1e-6, heads),
        laid_out := wgmma_linear.lays_out(image, text),
    )
    assert query_key.shape == (batch, text + image, 2, heads, 128)
    value = by_token(value, text + image) if laid_out else value
    # Some heads may take one stream's values, others the other's.
    bounds = [one.linear.bounds for one in layers]
    each = [one.norm.max() * b[2] + b[3] for one, b in zip(layers, bounds, strict=True)]
    torch.testing.assert_close(descales[2], (torch.stack(each).norm() / ROW).to(CUDA).expand(batch, heads))
    for layer, own, where in zip(layers, weights, (slice(text, None), slice(text)), strict=True):
        parts = layer.exact(CUDA).unflatten(-1, (3, heads, 128))
        both = [one for one in weights if one is not own] + [own]
        check_heads(parts, query_key[:, where], value[:, where], descales, both, turns[where], error_of)


def gated(layer: Layer, text: int, seed: int) -> tuple[tuple, Tensor]:
    """wgmma_gated_linear's arguments, of strided gates and streams, and what it is to give in float32."""
    random = torch.Generator().manual_seed(seed)
    batch, rows = layer.values.shape[:2]
    columns = len(layer.linear.weight)
    gate = torch.randn(batch, 3, columns, generator=random).bfloat16().to(CUDA)[:, 1]
    joint = torch.randn(batch, rows + 3, columns, generator=random).bfloat16().to(CUDA)
    before = joint[:, : rows - text], joint[:, rows - text + 3 : rows + 3] if text else None
    values, scale, _, *of_linear, _ = layer.arguments()
    stream = before[0] if before[1] is None else torch.cat([before[1], before[0]], dim=1)
    return (values, scale, *of_linear, gate, *before), stream.float() + gate.float()[:, None] * layer.exact(CUDA)


# Of the smallest, of tiles not full in either way, of many; below, at and above the number of pieces; tiles that three
# blocks of threads share, or four; the blocks'.
GATED = [
    *((1, 1, 0, 64, 256), (2, 77, 5, 256, 256), (1, 200, 0, 448, 768), (3, 130, 7, 1024, 896), (1, 20000, 9, 64, 256)),
    *((1, 300, 7, 448, 6144), (1, 300, 7, 448, 8192)),
    *((1, 4608, 512, 3072, 15360), (2, 4608, 512, 448, 3072)),
]


@gpu
@pytest.mark.usefixtures("_here")
@pytest.mark.parametrize(("batch", "rows", "text", "columns", "depth"), GATED)
def test_gated_residual(batch: int, rows: int, text: int, columns: int, depth: int, error_of: Callable) -> None:
    arguments, expected = gated(Layer(rows, columns, depth, 0, batch=batch), text, 1)
    out = wgmma_linear.wgmma_gated_linear(*arguments)
    assert not cuda_kernel.counters(CUDA).any(), "left as they were"
    assert out.is_contiguous()
    # bfloat16 rounds by 0.0017 on average, twice here; Hopper's tensor cores cut off what they add up in float8.
    assert error_of(out.float(), expected) < 0.005


def plain_sum(layer: Layer) -> Tensor:
    """x W^T by wgmma_gated_linear, without a bias, a gate or anything before it."""
    columns, (batch, rows) = len(layer.linear.weight), layer.values.shape[:2]
    layer.linear.bias.data.zero_()
    values, scale, _, *of_linear, _ = layer.arguments()
    gate = torch.ones(batch, columns, device=CUDA, dtype=torch.bfloat16)
    before = torch.zeros(batch, rows, columns, device=CUDA, dtype=torch.bfloat16)
    return wgmma_linear.wgmma_gated_linear(values, scale, *of_linear, gate, before, None).double()


@gpu
@pytest.mark.usefixtures("_here")
@pytest.mark.parametrize(("rows", "columns", "depth"), [(256, 448, 3072), (4608, 3072, 15360)])
def test_sums_do_not_shrink(rows: int, columns: int, depth: int) -> None:
    """Of normal numbers; rounded towards zero they would by 0.017 at a depth of 3072, by 0.08 at 15360."""
    layer = Layer(rows, columns, depth, 0)
    out, exact = plain_sum(layer), layer.exact(CUDA).double()
    assert abs((out * exact).sum() / exact.square().sum() - 1) < 0.005


@gpu
@pytest.mark.usefixtures("_here")
@pytest.mark.parametrize("depth", [3072, 12288, 15360])
def test_rows_along_the_weights(depth: int, error_of: Callable) -> None:
    """The largest sums there are; of every other row they come back to nothing in the second half."""
    layer = Layer(192, 192, depth, 0)
    weight = layer.linear.weight.float()
    x = weight * (17 / 16 * ROW / weight.norm(dim=1, keepdim=True))
    x[1::2, depth // 2 :] *= -1
    layer.values = x.to(torch.float8_e4m3fn)[None]
    out = plain_sum(layer)
    assert out.isfinite().all()
    assert error_of(out, layer.exact(CUDA).double()) < 0.005


@gpu
@pytest.mark.usefixtures("_here")
@pytest.mark.parametrize(
    ("batch", "image", "text", "columns", "depth"),
    [(1, 200, 77, 256, 256), (2, 130, 5, 448, 1024), (1, 4096, 512, 3072, 12288), (1, 4096, 512, 3072, 3072)],
)
def test_gated_residual_of_two_streams(
    batch: int, image: int, text: int, columns: int, depth: int, error_of: Callable
) -> None:
    both = [gated(Layer(n, columns, depth, 0, batch=batch, seed=n), 0, n) for n in (image, text)]
    out = wgmma_linear.wgmma_gated_linears(*(x for arguments, _ in both for x in arguments[:-1]))
    for result, (_, expected) in zip(out, both, strict=True):
        assert error_of(result.float(), expected) < 0.005


@gpu
@pytest.mark.usefixtures("_here")
def test_values_next_to_nothing(error_of: Callable) -> None:
    """Whose bound is below what a float16 takes the inverse of, but not by so much that float8 has no digits for it."""
    layer = Layer(200, 3 * 128 + 64, 256, 1, loud=0.5)
    layer.linear.weight_scale[256:384] *= 2e-4
    layer.linear.bias[256:384] *= 2e-4
    layer.linear.bound(1, 128)
    norms = torch.ones(2, 128, device=CUDA, dtype=torch.bfloat16)
    _, value, descales, *_ = wgmma_linear.wgmma_qkv_gelu_linear(*layer.arguments(), *norms, rotary(200), 1e-6, 1, False)
    assert layer.linear.bounds is not None
    assert (layer.norm.max() * layer.linear.bounds[2] + layer.linear.bounds[3]).item() < 0.007
    exact = layer.exact(CUDA)[..., 256:384].unflatten(-1, (1, 128))
    assert error_of(value.float() * descales[2, 0, 0], exact) < 0.03


@gpu
@pytest.mark.usefixtures("_here")
@DTYPES
def test_same_bits_every_time(dtype: torch.dtype) -> None:
    norms = torch.ones(2, 128, device=CUDA, dtype=torch.bfloat16)
    arguments = (*Layer(4608, 21504, 3072, 24, dtype=dtype).arguments(), *norms, rotary(4608), 1e-6, 24, True)
    first = wgmma_linear.wgmma_qkv_gelu_linear(*arguments)
    for _ in range(5):
        again = wgmma_linear.wgmma_qkv_gelu_linear(*arguments)
        for i in (2, 4):
            assert torch.equal(again[i], first[i])
        for i in (0, 1):
            assert torch.equal(again[i].view(torch.uint8), first[i].view(torch.uint8))
        assert torch.equal(again[3][..., 3072:].view(torch.uint8), first[3][..., 3072:].view(torch.uint8))
    assert wgmma_linear.shared_by(36 * 16, 132, 12288 // 128) == 2
    arguments, _ = gated(Layer(4608, 3072, 12288, 0), 512, 1)
    added = [wgmma_linear.wgmma_gated_linear(*arguments) for _ in range(5)]
    assert all(torch.equal(again, added[0]) for again in added)


def test_turns_are_those_of_diffusers() -> None:
    embed = FluxPosEmbed(theta=10000, axes_dim=[16, 56, 56])
    ids = torch.tensor([[0, 0, 0], [0, 3, 60], [1, 63, 7]])
    x = torch.randn(1, 3, 2, 128, generator=torch.Generator().manual_seed(0))
    normed = torch.nn.functional.rms_norm(x, x.shape[-1:], eps=1e-6)
    expected = apply_rotary_emb(normed, embed(ids), sequence_dim=1)
    (turns,) = gemm_epilogues.Turns(embed)(ids)
    torch.testing.assert_close(normed_and_turned(x, torch.ones(128), turns), expected, rtol=0, atol=4 * 2**-11)


def test_refuses_what_it_would_read_wrongly() -> None:
    cpu = torch.device("cpu")
    rows, scale, *layer = Layer(5, 448, 256, 1).arguments(cpu)
    norms = torch.ones(2, 128, dtype=torch.bfloat16)
    turns = torch.ones(5, 128, dtype=torch.float16)
    of_heads = (*norms, turns, 1e-6, 1, False)
    with pytest.raises(ValueError, match=r"scale is to be \[1, 5, 1\] torch.float32, contiguous, not \[1, 4, 1\]"):
        wgmma_linear.wgmma_qkv_gelu_linear(rows, scale[:, :4], *layer, *of_heads)
    with pytest.raises(ValueError, match=r"x is to be \[1, 5, 256\] torch.float8_e4m3fn, contiguous, not"):
        wgmma_linear.wgmma_qkv_gelu_linear(rows.float(), scale, *layer, *of_heads)
    with pytest.raises(ValueError, match=r"448 out features aren't .*, or fewer than 2 heads of 128 have"):
        wgmma_linear.wgmma_qkv_gelu_linear(rows, scale, *layer, *norms, turns, 1e-6, 2, False)
    with pytest.raises(ValueError, match=r"turns is to be \[5, 128\] torch.float16, contiguous, not \[4, 128\]"):
        wgmma_linear.wgmma_qkv_gelu_linear(rows, scale, *layer, *norms, turns[:4], 1e-6, 1, False)
    whole = Layer(5, 384, 256, 1).arguments(cpu)
    with pytest.raises(ValueError, match="384 out features are those of 1 heads: none are left for GELU"):
        wgmma_linear.wgmma_qkv_gelu_linear(*whole, *of_heads)
    two = Layer(5, 384, 256, 1, batch=2).arguments(cpu)
    of_both = (*norms, *norms, torch.ones(10, 128, dtype=torch.float16), 1e-6)
    with pytest.raises(ValueError, match=r"the streams' batches differ: \[1, 2\]"):
        wgmma_linear.wgmma_qkv_linears(*whole, *two, *of_both, 1, False)
    with pytest.raises(ValueError, match=r"values of \[5\] tokens aren't laid out: see lays_out"):
        wgmma_linear.wgmma_qkv_gelu_linear(rows, scale, *layer, *of_heads[:-1], True)
    with pytest.raises(ValueError, match="384 out features aren't those of 2 heads: 768"):
        wgmma_linear.wgmma_qkv_linears(*whole, *whole, *of_both, 2, False)
    in_int8 = Layer(5, 448, 256, 1, dtype=torch.int8).arguments(cpu)
    with pytest.raises(
        ValueError, match=r"weight is to be \[448, 256\] torch.int8, contiguous, not .* torch.float8_e4m3fn"
    ):
        wgmma_linear.wgmma_qkv_gelu_linear(*in_int8[:3], *layer[1:], *of_heads)
    with pytest.raises(
        ValueError, match=r"x is to be \[1, 5, 256\] torch.float8_e4m3fn, contiguous, not .* torch.int8"
    ):
        wgmma_linear.wgmma_qkv_gelu_linear(*in_int8[:2], None, *in_int8[3:], *of_heads)
    with pytest.raises(ValueError, match=r"norm is to be \[1, 5, 1\] torch.float32, contiguous, not \[1, 4, 1\]"):
        wgmma_linear.wgmma_qkv_gelu_linear(*in_int8[:2], in_int8[2][:, :4], *in_int8[3:], *of_heads)
    with pytest.raises(ValueError, match=r"the streams are to be of one dtype, not torch.float8_e4m3fn and torch.int8"):
        wgmma_linear.wgmma_gelu_linears(rows, scale, *layer, *in_int8)
    norm, weight, weight_scale, bias, bounds = layer
    gated = rows, scale, weight, weight_scale, bias
    gate, stream = (torch.zeros(1, *shape, dtype=torch.bfloat16) for shape in ((448,), (5, 448)))
    with pytest.raises(ValueError, match=r"residual is to be \[1, 4, 448\] bfloat16, .*, not \[1, 5, 448\]"):
        wgmma_linear.wgmma_gated_linear(*gated, gate, stream, stream[:, :1])
    with pytest.raises(ValueError, match=r"gate is to be \[1, 448\] bfloat16, .* not \[1, 448\] torch.float32"):
        wgmma_linear.wgmma_gated_linear(*gated, gate.float(), stream, None)
    with pytest.raises(ValueError, match="gate is read 16 bytes at once and its rows have to begin at a multiple of"):
        wgmma_linear.wgmma_gated_linear(*gated, torch.cat([gate[:, :1], gate], dim=1)[:, 1:], stream, None)
    shifted = torch.cat([bias[:1], bias])[1:]
    with pytest.raises(ValueError, match="bias is read 16 bytes at once and has to begin at a multiple of that"):
        wgmma_linear.wgmma_qkv_gelu_linear(rows, scale, norm, weight, weight_scale, shifted, bounds, *of_heads)
