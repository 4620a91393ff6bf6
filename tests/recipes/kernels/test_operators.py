"""Every custom operator against torch.library's contract, by its own `opcheck`: nothing is mutated, the fake kernel
gives what the real one does, autograd is registered where it belongs, and AOTAutograd traces it. On a CPU the fake
kernels; the operators that aren't Triton's have such tests beside theirs, with stand-ins for the libraries.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

pytest.importorskip("triton", reason="needs the package triton, which isn't installed")

import recipes
from recipes import (
    Recipe,
    cudnn_attention,
    cudnn_bfloat16,
    flash_attention_3,
    vae_attention,
    wgmma_attention,
    wgmma_linear,
)
from recipes.float8_heads import for_wgmma, to_float8, to_float8_by_norm, tokens_innermost
from recipes.kernels import adaln, attention, cast, gelu, group_norm, qkv, residual
from recipes.kernels.rows import rows_by_norm, rows_to_int8
from recipes.quantized_linear import weight_to_float8, weight_to_int8

BATCH, TEXT, IMAGE, HEADS, HEAD_DIM = 2, 3, 5, 2, 32
DIM = HEADS * HEAD_DIM
EPS = 1e-6
NAMESPACE = "flux_fast::"


class Inputs:
    """Random tensors on a device, bfloat16 if not said otherwise."""

    def __init__(self, device: torch.device):
        self.device, self.random = device, torch.Generator().manual_seed(0)

    def normal(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(*shape, generator=self.random).to(self.device, dtype)

    def streams(self, *shape: int) -> tuple[Tensor, Tensor]:
        """Image and text tokens [batch, tokens, *shape], views of one tensor as a single block gets them."""
        joint = self.normal(BATCH, TEXT + IMAGE, *shape)
        return joint[:, TEXT:], joint[:, :TEXT]

    def rows(self, parts: int) -> tuple[Tensor, ...]:
        """[batch, dim] each, parts of one Linear's output."""
        return self.normal(BATCH, parts * DIM).chunk(parts, dim=1)

    def heads(self, head_dim: int = HEAD_DIM) -> tuple[Tensor, ...]:
        """Query, key and value [batch, tokens, heads, head_dim], parts of one tensor."""
        return self.normal(BATCH, TEXT + IMAGE, 3, HEADS, head_dim).unbind(2)

    def float8_heads(self, head_dim: int = HEAD_DIM, per_head: bool = True) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """`heads` in float8, and their descales [3, batch, heads]."""
        *query_key, value = self.heads(head_dim)
        (q, a), (k, b) = (to_float8_by_norm(x, per_head) for x in query_key)
        v, c = to_float8(value, per_head)
        return q, k, v, torch.stack([a, b, c])

    def norm_and_rotary(self) -> tuple[Tensor, ...]:
        """The norms' four weights [head_dim], and cosines and sines [tokens, head_dim] float32."""
        angles = self.normal(TEXT + IMAGE, HEAD_DIM // 2, dtype=torch.float32).repeat_interleave(2, dim=1)
        return *self.normal(4, HEAD_DIM).unbind(0), angles.cos(), angles.sin()

    def turns(self, tokens: int) -> Tensor:
        """Cosines and sines [tokens, 128] float16."""
        angles = self.normal(tokens, 64, dtype=torch.float32)
        return torch.stack([angles.cos(), angles.sin()], dim=-1).flatten(1).half()


def attention_arguments(x: Inputs) -> tuple:
    q, k, v, descales = x.float8_heads()
    return q, k, tokens_innermost(v), descales


def wgmma_arguments(x: Inputs) -> tuple:
    q, k, v, descales = x.float8_heads(128)
    return q.contiguous(), k.contiguous(), for_wgmma(v), descales, True


def beside_arguments(x: Inputs) -> tuple:
    q, k, v, descales = x.float8_heads(128)
    rows = x.normal(BATCH, TEXT + IMAGE, HEADS * 128 + 64).to(torch.float8_e4m3fn)
    scale = x.normal(BATCH, TEXT + IMAGE, 1, dtype=torch.float32).abs() + 1
    return q.contiguous(), k.contiguous(), for_wgmma(v), descales, rows, scale


def linear_arguments(x: Inputs, tokens: int, columns: int, int8: bool = False) -> tuple:
    """As `wgmma_linear`'s operators take a stream and its layer of 256 in features."""
    rows = (rows_to_int8 if int8 else rows_by_norm)(x.normal(BATCH, tokens, 256))
    weight = (weight_to_int8 if int8 else weight_to_float8)(x.normal(columns, 256))
    return *rows[:2], rows[2] if int8 else None, *weight, x.normal(columns), x.normal(4, dtype=torch.float32).abs()


def gated_arguments(x: Inputs, tokens: int) -> tuple:
    """The same of 256 out features, a gate, and the stream before."""
    rows, scale, _, weight, weight_scale, bias, _ = linear_arguments(x, tokens, 256)
    return rows, scale, weight, weight_scale, bias, x.normal(BATCH, 3 * 256)[:, 256:512], x.normal(BATCH, tokens, 256)


def cudnn_float8_arguments(x: Inputs) -> tuple:
    q, k, v, descales = x.float8_heads(128, per_head=False)
    a, b, c = descales[:, 0, 0].unbind(0)
    one = torch.full_like(a, 256.0)
    return q, k, v, torch.stack([a, b, c, 1 / one, one, 1 / c])[:, None].expand(-1, 4).contiguous()


@dataclass(frozen=True)
class Case:
    """An operator, and arguments of it. attention: the recipe's, where the operator is part of that. mutates: which of
    the arguments it writes to. leaves_free: whether some of a result isn't written."""

    operator: Callable
    arguments: Callable[[Inputs], tuple]
    attention: str = "native"
    mutates: tuple[int, ...] = ()
    leaves_free: bool = False


CASES = {
    "adaln": Case(adaln.adaln, lambda x: (*x.streams(DIM), *x.rows(2), EPS)),
    "adaln_float8": Case(adaln.adaln_float8, lambda x: (*x.streams(DIM), *x.rows(2), EPS)),
    "adaln_int8": Case(adaln.adaln_int8, lambda x: (*x.streams(DIM), *x.rows(2), EPS)),
    "adaln_float8_streams": Case(adaln.adaln_float8_streams, lambda x: (*x.streams(DIM), *x.rows(4), EPS)),
    "adaln_int8_streams": Case(adaln.adaln_int8_streams, lambda x: (*x.streams(DIM), *x.rows(4), EPS)),
    "attention_float8": Case(attention.attention_float8, attention_arguments, "triton_fp8"),
    "concat_gelu": Case(gelu.concat_gelu, lambda x: x.streams(DIM)[:1] + x.streams(2 * DIM)[:1]),
    "concat_gelu_float8": Case(gelu.concat_gelu_float8, lambda x: x.streams(DIM)[:1] + x.streams(2 * DIM)[:1]),
    "gelu_float8": Case(gelu.gelu_float8, lambda x: x.streams(DIM)[:1]),
    "gated_residual": Case(
        residual.gated_residual, lambda x: (x.normal(BATCH, TEXT + IMAGE, DIM), *x.rows(1), *x.streams(DIM))
    ),
    "gated_residual_adaln": Case(
        residual.gated_residual_adaln,
        lambda x: (x.streams(DIM)[0], *x.rows(1), x.streams(DIM)[0], *x.rows(2), EPS),
    ),
    "gated_residual_adaln_float8": Case(
        residual.gated_residual_adaln_float8,
        lambda x: (x.streams(DIM)[0], *x.rows(1), x.streams(DIM)[0], *x.rows(2), EPS),
    ),
    "group_norm": Case(
        group_norm.group_norm,
        lambda x: (
            x.normal(BATCH, 32, 6, 4).contiguous(memory_format=torch.channels_last),
            *x.normal(2, 32),
            8,
            EPS,
            True,
            *x.normal(1, 32),
        ),
    ),
    "mm_float32": Case(vae_attention.mm_float32, lambda x: (x.normal(6, 16), x.normal(16, 4))),
    "qk_norm_rotary": Case(qkv.qk_norm_rotary, lambda x: (*x.streams(3, HEADS, HEAD_DIM), *x.norm_and_rotary(), EPS)),
    "qkv_norm_rotary_float8": Case(
        qkv.qkv_norm_rotary_float8,
        lambda x: (*x.streams(3, HEADS, HEAD_DIM), *x.norm_and_rotary(), EPS, "tokens_innermost", True),
    ),
    "lay_out_values": Case(qkv.lay_out_values, lambda x: (x.float8_heads(per_head=False)[2], "tokens_innermost")),
    "rows_float8": Case(cast.rows_float8, lambda x: x.streams(DIM)[:1]),
    "cudnn_attention": Case(cudnn_bfloat16.cudnn_attention, lambda x: x.heads(128), "cudnn"),
    "cudnn_attention_float8": Case(cudnn_attention.cudnn_attention_float8, cudnn_float8_arguments, "cudnn_fp8"),
    "flash_attention_3": Case(flash_attention_3.flash_attention_3, lambda x: x.heads(128), "fa3"),
    "flash_attention_3_float8": Case(
        flash_attention_3.flash_attention_3_float8, lambda x: x.float8_heads(128), "fa3_fp8"
    ),
    "wgmma_attention": Case(wgmma_attention.wgmma_attention, wgmma_arguments, "wgmma_fp8"),
    "wgmma_attention_beside": Case(wgmma_attention.wgmma_attention_beside, beside_arguments, "wgmma_fp8", (4,)),
    "wgmma_qkv_linears": Case(
        wgmma_linear.wgmma_qkv_linears,
        lambda x: (
            *(*linear_arguments(x, IMAGE, 768, True), *linear_arguments(x, TEXT, 768, True)),
            *(*x.normal(4, 128), x.turns(TEXT + IMAGE), EPS, 2, False),
        ),
        "wgmma_fp8",
    ),
    "wgmma_gated_linear": Case(
        wgmma_linear.wgmma_gated_linear,
        lambda x: (*gated_arguments(x, TEXT + IMAGE)[:-1], x.normal(BATCH, IMAGE, 256), x.normal(BATCH, TEXT, 256)),
        "wgmma_fp8",
    ),
    "wgmma_gated_linears": Case(
        wgmma_linear.wgmma_gated_linears, lambda x: gated_arguments(x, IMAGE) + gated_arguments(x, TEXT), "wgmma_fp8"
    ),
    "wgmma_gelu_linears": Case(
        wgmma_linear.wgmma_gelu_linears,
        lambda x: linear_arguments(x, IMAGE, 256) + linear_arguments(x, TEXT, 256),
        "wgmma_fp8",
    ),
    "wgmma_qkv_gelu_linear": Case(
        wgmma_linear.wgmma_qkv_gelu_linear,
        lambda x: (*linear_arguments(x, IMAGE, 896), *x.normal(2, 128), x.turns(IMAGE), EPS, 2, False),
        "wgmma_fp8",
        leaves_free=True,
    ),
}


def test_every_operator_is_here() -> None:
    known = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith(NAMESPACE)}
    assert known == {NAMESPACE + name for name in CASES}


def is_quantized(x: object) -> bool:
    return isinstance(x, Tensor) and x.dtype in (torch.float8_e4m3fn, torch.int8)


def check(case: Case, device: torch.device) -> None:
    arguments = case.arguments(Inputs(device))
    # The last compares two calls' results, which where they are free hold anything.
    utils = ("test_faketensor", *([] if case.leaves_free else ["test_aot_dispatch_static"]))
    torch.library.opcheck(case.operator, arguments, test_utils=utils)
    if not any(map(is_quantized, arguments)):
        torch.library.opcheck(case.operator, arguments, test_utils="test_schema")
        first, *others = arguments
        asked = (first.detach().clone().requires_grad_(), *others)
        torch.library.opcheck(case.operator, asked, test_utils="test_autograd_registration")
        return
    # opcheck does arithmetic with what may have been mutated, and needs a gradient: what is quantized has neither.
    tensors = [x for x in arguments if isinstance(x, Tensor)]
    before = [x.view(torch.uint8).clone() if is_quantized(x) else x.clone() for x in tensors]
    results = case.operator(*arguments)
    written = [arguments[i] for i in case.mutates]
    for x, kept in zip(tensors, before, strict=True):
        same = torch.equal(x.view(torch.uint8) if is_quantized(x) else x, kept)
        assert same == all(x is not other for other in written)
    assert_no_alias(results, arguments)


def each(results: Tensor | tuple[Tensor, ...] | None) -> tuple[Tensor, ...]:
    return results if isinstance(results, tuple) else () if results is None else (results,)


def assert_no_alias(results: Tensor | tuple[Tensor, ...] | None, arguments: tuple) -> None:
    given = [x.untyped_storage()._cdata for x in arguments if isinstance(x, Tensor)]
    for result in each(results):
        assert result.untyped_storage()._cdata not in given


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_meets_torch_librarys_contract(name: str) -> None:
    case, device = CASES[name], torch.device("cuda")
    needed = Recipe(dtype="bfloat16", attention=case.attention)
    if refusal := recipes.refusal(needed, device):
        pytest.skip(refusal)
    check(case, device)


@pytest.mark.parametrize("name", CASES)
def test_fake_kernel(name: str) -> None:
    """As torch.compile and torch.export call it: tensors without values, which no real kernel could take."""
    case = CASES[name]
    with FakeTensorMode():
        given = case.arguments(Inputs(torch.device("cpu")))
        results = case.operator(*given)
    assert (results is None) == bool(case.mutates)
    for result in each(results):
        assert isinstance(result, FakeTensor)
        assert result.dtype in (torch.bfloat16, torch.float8_e4m3fn, torch.float32)
    assert_no_alias(results, given)
