"""Each kernel against its float32 reference: odd sizes, batches, strided inputs, one and two streams."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch

pytest.importorskip("triton", reason="needs the package triton, which isn't installed")

from recipes.float8_heads import LONGEST, lay_out, to_float8, tokens_innermost
from recipes.kernels import adaln, attention, cast, gelu, group_norm, qkv, residual
from recipes.kernels.rows import rows_to_float8
from recipes.quantized_linear import ROW

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = [] if INTERPRETED else [pytest.mark.gpu]
EPS = 1e-6
# Half a unit in the last place, with room for float32 sums in another order.
BFLOAT16, E4M3 = 2**-8, 2**-4
SIZES = [(1, 1, 0, 32), (2, 5, 3, 96), (3, 7, 4, 200), *([] if INTERPRETED else [(2, 1000, 77, 3072)])]


@pytest.fixture
def normal(device: torch.device) -> Callable[..., torch.Tensor]:
    random = torch.Generator().manual_seed(0)

    def draw(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.randn(*shape, generator=random).to(device, dtype)

    return draw


def modulation(normal: Callable, batch: int, dim: int, parts: int) -> tuple[torch.Tensor, ...]:
    """Parts of one Linear's output, as the blocks have them: rows with gaps between."""
    return normal(batch, parts * dim).chunk(parts, dim=1)


def streams(normal: Callable, batch: int, image: int, text: int, dim: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Image and text as views of one tensor, as a single block gets them."""
    joint = normal(batch, text + image, dim)
    return joint[:, text:], joint[:, :text] if text else None


def assert_rounded(value: torch.Tensor, reference: torch.Tensor, unit: float = BFLOAT16) -> None:
    """`value` is `reference` rounded, with room for values next to a border."""
    assert value.is_contiguous()
    torch.testing.assert_close(value.float(), reference.float(), rtol=1.1 * unit, atol=1e-5)


def assert_float8(
    got: tuple[torch.Tensor, torch.Tensor], reference: torch.Tensor, same: tuple[torch.Tensor, torch.Tensor]
) -> None:
    """got: float8 and scale, those of `reference` (float32); nearly all bits are those of `same`, the reference's."""
    values, scale = got
    assert values.dtype == torch.float8_e4m3fn
    assert scale.dtype == torch.float32
    torch.testing.assert_close(scale, same[1], rtol=1e-4, atol=0)
    restored = values.float() * scale
    # Below 2^-6 e4m3 is subnormal: there the step is 2^-9.
    room = reference.abs() * 1.1 * E4M3 + scale * 1.1 * 2**-10
    assert ((restored - reference).abs() <= room).all()
    differing = (values.view(torch.uint8) != same[0].view(torch.uint8)).float().mean()
    assert differing < 0.01, "rounded another way"


def assert_short(values: torch.Tensor) -> None:
    """Rows as they were rounded are no longer than a float8 Linear takes them, and no shorter than they need be."""
    lengths = values.float().norm(dim=-1)
    assert (lengths <= ROW).all()
    assert (lengths >= 0.85 * ROW).all()


@pytest.mark.parametrize(("batch", "image", "text", "dim"), SIZES)
def test_adaln(normal: Callable, batch: int, image: int, text: int, dim: int) -> None:
    inputs = (*streams(normal, batch, image, text, dim), *modulation(normal, batch, dim, 3)[:2], EPS)
    reference = adaln.reference(*inputs)
    assert_rounded(adaln.adaln(*inputs), reference)
    rows = adaln.adaln_float8(*inputs)
    assert_float8(rows, reference, adaln.reference_float8(*inputs))
    assert_short(rows[0])
    values, scale, norm = adaln.adaln_int8(*inputs)
    same_values, same_scale, same_norm = adaln.reference_int8(*inputs)
    torch.testing.assert_close(scale, same_scale, rtol=1e-4, atol=0)
    torch.testing.assert_close(norm, same_norm, rtol=1e-3, atol=0)
    assert (norm >= (values.double() * scale).norm(dim=-1, keepdim=True)).all(), "a bound"
    assert (values.abs().amax(dim=-1) == 127).all()
    assert ((values.float() * scale - reference).abs() <= scale * 0.501).all(), "rounded to nearest"
    assert (values != same_values).float().mean() < 0.01


@pytest.mark.parametrize(("batch", "image", "text", "dim"), [size for size in SIZES if size[2]])
def test_adaln_of_two_streams(normal: Callable, batch: int, image: int, text: int, dim: int) -> None:
    """Bit for bit that of each by itself, with its own modulation."""
    of_image, of_text = streams(normal, batch, image, text, dim)
    image_norm = modulation(normal, batch, dim, 6)[1:3]
    text_norm = modulation(normal, batch, dim, 3)[:2]
    for alone, together in (
        (adaln.adaln_float8, adaln.adaln_float8_streams),
        (adaln.adaln_int8, adaln.adaln_int8_streams),
    ):
        expected = (*alone(of_image, None, *image_norm, EPS), *alone(of_text, None, *text_norm, EPS))
        found = together(of_image, of_text, *image_norm, *text_norm, EPS)
        assert len(found) == len(expected)
        assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_int8_of_a_row_of_one_value(device: torch.device) -> None:
    """LayerNorm leaves nothing of it: the scale is the smallest there is."""
    row, zero = torch.ones(1, 2, 512, device=device), torch.zeros(1, 512, device=device)
    values, scale, norm = adaln.adaln_int8(row, None, zero, zero, EPS)
    assert not values.any()
    assert (norm < 1e-12).all()
    torch.testing.assert_close(scale, torch.full_like(scale, 1e-12 / 127))
    values, scale, norm = adaln.adaln_int8(row, None, zero - 3, zero, EPS)
    assert (values == -127).all()
    torch.testing.assert_close(norm, torch.full_like(norm, (3 + 0.5 * 3 / 127) * 512**0.5 * 1.001))


def test_adaln_of_far_from_zero_mean(normal: Callable) -> None:
    """The variance isn't computed as a difference of two large numbers."""
    image, (shift, scale) = normal(1, 4, 96, dtype=torch.float32) + 1000, modulation(normal, 1, 96, 2)
    out = adaln.adaln(image, None, shift, scale, EPS)
    torch.testing.assert_close(out, adaln.reference(image, None, shift, scale, EPS), rtol=1e-3, atol=1e-3)


def test_norm_of_rows_that_float8_rounds_up(device: torch.device) -> None:
    """All but the largest values lie just above the middle between two of float8's, where it adds most: 1/17."""
    row = torch.ones(1, 1, 512, device=device)
    row[..., ::2] *= -1  # no mean
    row[..., :2] *= 7.13  # such that by their norm, 24.73, the others are 17.01 in float8
    factor = row.float().norm() / 512**0.5  # what LayerNorm divides by comes back as the modulation
    zero = torch.zeros(1, 512, device=device)
    values, scale = adaln.adaln_float8(row, None, zero, zero + factor - 1, 0.0)
    assert (values.float() * scale).norm() > 1.04 * row.float().norm()
    assert_short(values)


@pytest.mark.parametrize(("batch", "image", "text", "dim"), SIZES)
def test_gelu(normal: Callable, batch: int, image: int, text: int, dim: int) -> None:
    hidden, attended = 3 * normal(batch, image, 4 * dim), normal(batch, text + image, dim)[:, text:]
    for before in (None, attended):
        reference = gelu.reference(before, hidden)
        got = gelu.gelu_float8(hidden) if before is None else gelu.concat_gelu_float8(before, hidden)
        assert_float8(got, reference, gelu.reference_float8(before, hidden))
    assert_rounded(gelu.concat_gelu(attended, hidden), gelu.reference(attended, hidden))
    inputs = (attended.to(torch.float8_e4m3fn), hidden, 1 + normal(batch, image, 1, dtype=torch.float32) ** 2)
    assert_float8(gelu.concat_gelu_float8(*inputs), gelu.reference(*inputs), gelu.reference_float8(*inputs))


def test_gelu_of_extremes(device: torch.device) -> None:
    hidden = torch.tensor([[[-1e4, -20.0, -1.0, 0.0, 1.0, 20.0, 1e4, 3e38]]], device=device)
    out = gelu.concat_gelu(hidden[..., :0], hidden)
    torch.testing.assert_close(out, gelu.reference(None, hidden))


@pytest.mark.parametrize(("batch", "image", "text", "dim"), SIZES)
def test_cast(normal: Callable, batch: int, image: int, text: int, dim: int) -> None:
    x = normal(batch, text + image, dim)[:, text:]
    assert_float8(cast.rows_float8(x), x.float(), rows_to_float8(x))


def test_rows_of_zeros_stay_zeros(device: torch.device) -> None:
    values, scale = cast.rows_float8(torch.zeros(1, 3, 40, device=device))
    assert (values.float() == 0).all()
    assert (scale > 0).all()


def test_columns_apart_are_refused(normal: Callable) -> None:
    with pytest.raises(ValueError, match="x: the last dimension has stride 5, and it must be contiguous"):
        cast.rows_float8(normal(1, 8, 5).transpose(1, 2))


@pytest.mark.parametrize(("batch", "image", "text", "dim"), SIZES)
def test_gated_residual(normal: Callable, batch: int, image: int, text: int, dim: int) -> None:
    inputs = (normal(batch, text + image, dim), modulation(normal, batch, dim, 3)[2])
    inputs = (*inputs, *streams(normal, batch, image, text, dim))
    assert_rounded(residual.gated_residual(*inputs), residual.reference(*inputs))


@pytest.mark.parametrize(("batch", "image", "text", "dim"), SIZES)
def test_gated_residual_adaln(normal: Callable, batch: int, image: int, text: int, dim: int) -> None:
    gate, shift, scale = modulation(normal, batch, dim, 3)
    before = streams(normal, batch, image, text, dim)[0]
    # In halves, so that both round the stream alike: a sum's last bit would change the whole row's norm.
    x, gate, before = (torch.round(2 * t) / 2 for t in (normal(batch, image, dim), gate, before))
    inputs = (x, gate, before, shift, scale, EPS)
    hidden, normed = residual.gated_residual_adaln(*inputs)
    expected_hidden, expected = residual.reference_adaln(*inputs)
    assert torch.equal(hidden, expected_hidden)
    assert_rounded(normed, expected)
    hidden, *rows = residual.gated_residual_adaln_float8(*inputs)
    assert torch.equal(hidden, expected_hidden)
    _, *same = residual.reference_adaln_float8(*inputs)
    assert_float8(tuple(rows), expected, tuple(same))
    assert_short(rows[0])


QKV_SIZES = [
    (1, 3, 0, 1, 32),
    (2, 30, 7, 3, 32),
    (2, 50, 0, 2, 128),
    *([] if INTERPRETED else [(2, 1000, 77, 24, 128)]),
]


def qkv_inputs(normal: Callable, batch: int, image: int, text: int, heads: int, head_dim: int) -> tuple:
    """The arguments of both kernels but for the last two, and those of their reference."""

    def stream(tokens: int, factor: int) -> torch.Tensor:
        return factor * normal(batch, tokens, 3 * heads * head_dim).unflatten(-1, (3, heads, head_dim))

    weights = [1 + normal(head_dim) / 4 for _ in range(4)]
    angles = (6 * normal(text + image, head_dim // 2, dtype=torch.float32)).repeat_interleave(2, dim=1)
    image_qkv, text_qkv = stream(image, 1), stream(text, 3) if text else None
    if text_qkv is None:
        weights[2:] = [None, None]
    of_text = None if text_qkv is None else tuple(weights[2:])
    arguments = (image_qkv, text_qkv, *weights, angles.cos(), angles.sin(), EPS)
    return arguments, (image_qkv, text_qkv, tuple(weights[:2]), of_text, angles.cos(), angles.sin(), EPS)


@pytest.mark.parametrize(("batch", "image", "text", "heads", "head_dim"), QKV_SIZES)
def test_qk_norm_rotary(normal: Callable, batch: int, image: int, text: int, heads: int, head_dim: int) -> None:
    arguments, of_reference = qkv_inputs(normal, batch, image, text, heads, head_dim)
    out = qkv.qk_norm_rotary(*arguments)
    assert out.shape == (batch, text + image, 3 if text else 2, heads, head_dim)
    assert out.is_contiguous()
    reference = qkv.reference(*of_reference)[:, :, : out.shape[2]]
    # A difference of two products may be smaller than either one's last place.
    torch.testing.assert_close(out.float(), reference, rtol=1.1 * BFLOAT16, atol=1e-4)


@pytest.mark.parametrize("layout", ["by_token", "tokens_innermost", "for_wgmma"])
@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize(("batch", "image", "text", "heads", "head_dim"), QKV_SIZES)
def test_qkv_norm_rotary_float8(
    normal: Callable, batch: int, image: int, text: int, heads: int, head_dim: int, per_head: bool, layout: str
) -> None:
    arguments, of_reference = qkv_inputs(normal, batch, image, text, heads, head_dim)
    if layout == "for_wgmma" and head_dim != 128:
        with pytest.raises(ValueError, match=f"for_wgmma is that of heads of 128 values, not of {head_dim}"):
            qkv.qkv_norm_rotary_float8(*arguments, layout, per_head)
        return
    query_key, laid_out, descales = qkv.qkv_norm_rotary_float8(*arguments, layout, per_head)
    value = qkv.qkv_norm_rotary_float8(*arguments, "by_token", per_head)[1]
    assert torch.equal(laid_out.view(torch.uint8), lay_out(value, layout).view(torch.uint8))
    again = qkv.lay_out_values(value, layout)
    assert torch.equal(again.view(torch.uint8), laid_out.view(torch.uint8)), "what is float8 already"
    reference = qkv.reference(*of_reference)
    expected = qkv.reference_descales(reference, *of_reference[2:4], per_head)
    torch.testing.assert_close(descales, expected, rtol=1e-5, atol=0)
    assert (query_key.float().norm(dim=-1) <= 17 / 16 * LONGEST).all(), "a score is a float16"
    restored = torch.cat([query_key.float(), value.float()[:, :, None]], dim=2)
    by_part = descales.permute(1, 0, 2)[:, None, :, :, None]
    restored = restored * by_part
    assert ((restored - reference).abs() <= reference.abs() * 1.1 * E4M3 + by_part * 1.1 * 2**-10 + 1e-5).all()


ATTENTION_SIZES = [
    (1, 32, 32, 1, 32),
    (2, 37, 50, 3, 32),
    (2, 70, 5, 2, 64),
    *([] if INTERPRETED else [(2, 1111, 777, 3, 128)]),
]


def choose(config: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the kernel have one of its configurations; in the interpreter with blocks smaller than the inputs."""
    if INTERPRETED:
        monkeypatch.setattr(
            attention.CONFIGS[config], "kwargs", {**attention.CONFIGS[config].kwargs, "QUERIES": 32, "KEYS": 32}
        )
    monkeypatch.setattr(attention._attention_kernel, "configs", [attention.CONFIGS[config]])


@pytest.mark.parametrize("config", range(len(attention.CONFIGS)) if not INTERPRETED else [0, 1])
@pytest.mark.parametrize(("batch", "tokens", "keys", "heads", "head_dim"), ATTENTION_SIZES)
def test_attention_float8(
    normal: Callable, error_of: Callable, monkeypatch: pytest.MonkeyPatch,
    batch: int, tokens: int, keys: int, heads: int, head_dim: int, config: int,
) -> None:  # fmt: skip
    choose(config, monkeypatch)
    loud = 1 + torch.arange(heads, device=normal(1).device)[:, None]  # a scale of its own for each head
    query, key, value = (normal(batch, n, heads, head_dim) * loud for n in (tokens, keys, keys))
    (q, dq), (k, dk), (v, dv) = (to_float8(x) for x in (query, key, value))
    descales = torch.stack([dq, dk, dv])
    # Query and key as the fused kernel leaves them: one head_dim after the other in a wider tensor.
    q = torch.stack([q.view(torch.uint8), q.view(torch.uint8)], dim=2).view(torch.float8_e4m3fn)[:, :, 0]
    inputs = (q, k, tokens_innermost(v), descales)
    reference = attention.reference(*inputs, keys)
    out = attention.attention_float8(*inputs)
    assert out.dtype == torch.bfloat16
    assert out.shape == (batch, tokens, heads, head_dim)
    # Rounding each probability to 3 bits of mantissa is 2.6 % rms, less what the sum over keys averages out.
    for image in range(batch):
        for head in range(heads):
            assert error_of(out[image, :, head].float(), reference[image, :, head]) < 0.03
    whole = torch.nn.functional.scaled_dot_product_attention(
        *(x.float().transpose(1, 2) for x in (query, key, value))
    ).transpose(1, 2)
    if head_dim >= 64:
        assert error_of(attention.triton_fp8(query, key, value).float(), whole) < 0.2


@pytest.mark.parametrize(("keys", "left_out"), [(4608, 0), (4600, 2), (50, 2)])
def test_search_leaves_out_what_spills_registers(keys: int, left_out: int) -> None:
    kernel = attention._attention_kernel
    tried = kernel.early_config_prune(kernel.configs, {}, KEY_TOKENS=keys, HEAD_DIM=128, SOFTMAX_SCALE=0.1)
    assert len(kernel.configs) - len(tried) == left_out
    assert all(
        config.kwargs["LATE"] and config.kwargs["KEYS"] == 128 for config in kernel.configs if config not in tried
    )


@pytest.mark.parametrize("head_dim", [16, 48])
def test_attention_of_other_heads_is_refused(device: torch.device, head_dim: int) -> None:
    x = torch.ones(1, 16, 1, head_dim, device=device, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=f"takes heads of 32, 64 or 128 values, not of {head_dim}"):
        attention.triton_fp8(x, x, x)


def test_attention_of_keys_out_of_reach(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """What lies in the values' padding is never read, though it be not a number."""
    choose(0, monkeypatch)
    x = torch.ones(1, 37, 1, 32, device=device)
    q, descale = to_float8(x)
    value = tokens_innermost(q)
    value.view(torch.uint8)[..., 37:] = 0x7F  # NaN
    out = attention.attention_float8(q, q, value, torch.stack([descale] * 3))
    torch.testing.assert_close(out.float(), x, rtol=1e-2, atol=0)


IMAGES = [
    (1, 64, 5, 7, 8),
    (2, 128, 33, 9, 32),
    *([] if INTERPRETED else [(1, 128, 1024, 1024, 32), (2, 512, 96, 128, 32)]),
]


@pytest.mark.parametrize(("batch", "channels", "height", "width", "groups"), IMAGES)
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("shifted", [False, True])
def test_group_norm(
    normal: Callable, batch: int, channels: int, height: int, width: int, groups: int, silu: bool, shifted: bool
) -> None:
    x = normal(batch, channels, height, width) + 3 * normal(1, channels, 1, 1)
    weight, bias = normal(channels), normal(channels)
    added = 3 * normal(channels) if shifted else None
    expected = group_norm.reference(x, weight, bias, groups, EPS, silu, added)
    for memory_format in (torch.channels_last, torch.contiguous_format):
        out = group_norm.group_norm(x.contiguous(memory_format=memory_format), weight, bias, groups, EPS, silu, added)
        assert out.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(out.float(), expected, rtol=1.1 * BFLOAT16, atol=1e-4)


def test_group_norm_of_a_large_mean(normal: Callable, device: torch.device) -> None:
    """In float32, where a sum of squares would lose the deviation."""
    x = (normal(1, 32, 40, 40, dtype=torch.float32) + 1000).contiguous(memory_format=torch.channels_last)
    weight, bias = torch.ones(32, device=device), torch.zeros(32, device=device)
    expected = torch.nn.functional.group_norm(x.double(), 8, eps=EPS)
    out = group_norm.group_norm(x, weight, bias, 8, EPS, False)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=1e-3)


def test_group_norm_refuses_other_numbers_of_channels(normal: Callable) -> None:
    with pytest.raises(ValueError, match="not 48 in 8"):
        group_norm.group_norm(normal(1, 48, 4, 4), normal(48), normal(48), 8, EPS, True)
