"""The transformer's blocks on fused kernels: the forward of both kinds, for Linears in bfloat16 and quantized.

The maths is that of diffusers' blocks, rounded less often. What a Linear takes is a tensor, or, where the Linears are
quantized, rows that the kernel before has cast.

Source: FluxTransformerBlock, FluxSingleTransformerBlock and FluxAttnProcessor of diffusers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch.nn.functional as F
from diffusers.models.transformers.transformer_flux import (
    FluxAttention,
    FluxSingleTransformerBlock,
    FluxTransformerBlock,
)
from torch import Tensor, nn

from recipes import wgmma_linear
from recipes.attention_backends import Backend
from recipes.kernels import adaln, cast, gelu, qkv, residual

Norm = tuple[Tensor, Tensor, float]  # AdaLN's shift, scale and eps
Rotary = tuple[Tensor, ...]  # the cosines and sines; of Epilogues, gemm_epilogues.Turns'
Kernels = Any  # Plain, Float8 or Epilogues: what one's adaln and gelu_linears give, its other Linears take


class Rows(NamedTuple):
    """Quantized activations: values [batch, tokens, features] float8_e4m3fn, scale [batch, tokens, 1] float32.

    Or values in int8, and norm [batch, tokens, 1] float32, no less than that of the row, values times scale.
    """

    values: Tensor
    scale: Tensor
    norm: Tensor | None = None


class Gated(NamedTuple):
    """A Linear, its input, and what its result is added to, times the gate."""

    linear: nn.Module
    x: Any  # as the kernels' `linear` takes it
    gate: Tensor
    residual: Tensor


@dataclass(frozen=True)
class _Apart:
    """What follows a Linear in a kernel of its own, one stream after the other. A subclass has `adaln` and `linear`."""

    attention: Backend

    def adaln_streams(self: Kernels, image: Tensor, text: Tensor, of_image: Norm, of_text: Norm) -> list[Any]:
        return [self.adaln(image, None, *of_image), self.adaln(text, None, *of_text)]

    def gated_linear(self: Kernels, one: Gated, text_residual: Tensor | None) -> Tensor:
        return residual.gated_residual(self.linear(one.linear, one.x), one.gate, one.residual, text_residual)

    def gated_linears(self: Kernels, streams: Sequence[Gated]) -> list[Tensor]:
        return [self.gated_linear(one, None) for one in streams]


@dataclass(frozen=True)
class Plain(_Apart):
    """The kernels between Linears of the activations' own dtype."""

    def adaln(self, image: Tensor, text: Tensor | None, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
        return adaln.adaln(image, text, shift, scale, eps)

    def gated_linears_adaln(self, streams: Sequence[Gated], norms: Sequence[Norm]) -> list[tuple[Tensor, Tensor]]:
        updates = [self.linear(one.linear, one.x) for one in streams]
        together = zip(updates, streams, norms, strict=True)
        return [residual.gated_residual_adaln(x, one.gate, one.residual, *norm) for x, one, norm in together]

    def attention_and_mlp(self, attn: FluxAttention, linear: nn.Module, x: Tensor, rotary: Rotary) -> Tensor:
        return gelu.concat_gelu(*_attention_and_mlp(self, attn, linear, x, rotary))

    def joint_attention(self, attn: FluxAttention, image: Tensor, text: Tensor, rotary: Rotary) -> Tensor | Rows:
        return _joint_attention(self, attn, image, text, rotary)

    def streams(self, attended: Tensor, tokens: list[int]) -> list[Tensor]:
        return list(attended.split(tokens, dim=1))

    def linear(self, linear: nn.Module, x: Tensor) -> Tensor:
        return linear(x)

    def gelu_linears(self, pairs: Sequence[tuple[nn.Module, Tensor]]) -> list[Tensor]:
        return [F.gelu(self.linear(*pair), approximate="tanh") for pair in pairs]


@dataclass(frozen=True)
class Float8(_Apart):
    """The kernels between `QuantizedLinear`s: what goes into one is cast where it is made."""

    def adaln(self, image: Tensor, text: Tensor | None, shift: Tensor, scale: Tensor, eps: float) -> Rows:
        return Rows(*adaln.adaln_float8(image, text, shift, scale, eps))

    def gated_linears_adaln(self, streams: Sequence[Gated], norms: Sequence[Norm]) -> list[tuple[Tensor, Rows]]:
        found = []
        updates = [self.linear(one.linear, one.x) for one in streams]
        for x, one, norm in zip(updates, streams, norms, strict=True):
            arguments = (x, one.gate, one.residual, *norm)
            hidden, *rows = residual.gated_residual_adaln_float8(*arguments)
            found.append((hidden, Rows(*rows)))
        return found

    def attention_and_mlp(self, attn: FluxAttention, linear: nn.Module, x: Rows, rotary: Rotary) -> Rows:
        attended, hidden = _attention_and_mlp(self, attn, linear, x, rotary)
        values, scale = attended[:2] if isinstance(attended, Rows) else (attended, None)
        return Rows(*gelu.concat_gelu_float8(values, hidden, scale))

    def joint_attention(self, attn: FluxAttention, image: Rows, text: Rows, rotary: Rotary) -> Tensor | Rows:
        return _joint_attention(self, attn, image, text, rotary)

    def streams(self, attended: Tensor | Rows, tokens: list[int]) -> list[Rows]:
        if isinstance(attended, Rows):
            values, scales = (x.split(tokens, dim=1) for x in (attended.values, attended.scale))
            return [Rows(*parts) for parts in zip(values, scales, strict=True)]
        return [Rows(*cast.rows_float8(stream)) for stream in attended.split(tokens, dim=1)]

    def linear(self, linear: nn.Module, x: Rows) -> Tensor:
        return linear(x.values, x.scale)

    def gelu_linears(self, pairs: Sequence[tuple[nn.Module, Rows]]) -> list[Rows]:
        return [Rows(*gelu.gelu_float8(self.linear(*pair))) for pair in pairs]


@dataclass(frozen=True)
class Epilogues(Float8):
    """As Float8, but GELU, RMSNorm, rotary embedding and gated residual are done in the kernel of the Linear before
    them, of both streams in one launch. int8: AdaLN's rows are in int8."""

    int8: bool = False

    def adaln(self, image: Tensor, text: Tensor | None, shift: Tensor, scale: Tensor, eps: float) -> Rows:
        cast = adaln.adaln_int8 if self.int8 else adaln.adaln_float8
        return Rows(*cast(image, text, shift, scale, eps))

    def adaln_streams(self, image: Tensor, text: Tensor, of_image: Norm, of_text: Norm) -> list[Rows]:
        cast = adaln.adaln_int8_streams if self.int8 else adaln.adaln_float8_streams
        assert of_image[2] == of_text[2], "one launch has one eps"
        out = cast(image, text, *of_image[:2], *of_text)
        return [Rows(*out[: len(out) // 2]), Rows(*out[len(out) // 2 :])]

    def attention_and_mlp(self, attn: FluxAttention, linear: nn.Module, x: Rows, rotary: Rotary) -> Rows:
        """The attention fills the first columns of the MLP's rows."""
        assert self.attention.float8 is not None
        assert self.attention.float8.beside is not None
        heads = attn.inner_dim // attn.head_dim
        laid_out = wgmma_linear.lays_out(x.values.shape[1])
        of_heads = (attn.norm_q.weight, attn.norm_k.weight, *rotary, attn.norm_q.eps, heads, laid_out)
        query_key, value, descales, *rows = wgmma_linear.wgmma_qkv_gelu_linear(*bounded(linear, x), *of_heads)
        value = value if laid_out else qkv.lay_out_values(value, self.attention.float8.value_layout)
        self.attention.float8.beside(query_key[:, :, 0], query_key[:, :, 1], value, descales, *rows)
        return Rows(*rows)

    def joint_attention(self, attn: FluxAttention, image: Rows, text: Rows, rotary: Rotary) -> Rows:
        assert self.attention.float8 is not None
        assert self.attention.float8.rows is not None
        linears = (*bounded(attn.to_qkv, image), *bounded(attn.to_added_qkv, text))
        norms = (attn.norm_q.weight, attn.norm_k.weight, attn.norm_added_q.weight, attn.norm_added_k.weight)
        laid_out = wgmma_linear.lays_out(image.values.shape[1], text.values.shape[1])
        of_heads = (*norms, *rotary, attn.norm_q.eps, attn.inner_dim // attn.head_dim, laid_out)
        query_key, value, descales = wgmma_linear.wgmma_qkv_linears(*linears, *of_heads)
        value = value if laid_out else qkv.lay_out_values(value, self.attention.float8.value_layout)
        values, scale = self.attention.float8.rows(query_key[:, :, 0], query_key[:, :, 1], value, descales)
        return Rows(values.flatten(2, 3), scale)

    def gated_linear(self, one: Gated, text_residual: Tensor | None) -> Tensor:
        return wgmma_linear.wgmma_gated_linear(*_gated(one), text_residual)

    def gated_linears(self, streams: Sequence[Gated]) -> list[Tensor]:
        first, second = (_gated(one) for one in streams)
        return list(wgmma_linear.wgmma_gated_linears(*first, *second))

    def gated_linears_adaln(self, streams: Sequence[Gated], norms: Sequence[Norm]) -> list[tuple[Tensor, Rows]]:
        image, text = self.gated_linears(streams)
        of_image, of_text = self.adaln_streams(image, text, *norms)
        return [(image, of_image), (text, of_text)]

    def gelu_linears(self, pairs: Sequence[tuple[nn.Module, Rows]]) -> list[Rows]:
        first, second = (bounded(*pair) for pair in pairs)
        out = wgmma_linear.wgmma_gelu_linears(*first, *second)
        return [Rows(*out[:2]), Rows(*out[2:])]


def _gated(one: Gated) -> tuple[Any, ...]:
    """As `wgmma_linear`'s operators take it; a stream of a batch's is a part of rows, and copied."""
    linear: Any = one.linear
    values, scale = (x.contiguous() for x in one.x[:2])
    return values, scale, linear.weight, linear.weight_scale, linear.bias, one.gate, one.residual


def bounded(linear: Any, x: Rows) -> tuple[Any, ...]:
    """A stream and its QuantizedLinear as `wgmma_linear`'s operators take them."""
    return *x, linear.weight, linear.weight_scale, linear.bias, linear.bounds


def double_block(
    self: FluxTransformerBlock,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: Rotary,
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor]:
    """FluxTransformerBlock.forward; returns the text stream [batch, text tokens, dim] and the image stream."""
    _refuse(joint_attention_kwargs)
    kernels, attn = self.kernels, self.attn
    image, text = hidden_states, encoder_hidden_states
    of_image, of_text = _modulation(self.norm1, temb, 6), _modulation(self.norm1_context, temb, 6)
    norms = (*of_image[:2], self.norm1.norm.eps), (*of_text[:2], self.norm1_context.norm.eps)
    image_normed, text_normed = kernels.adaln_streams(image, text, *norms)
    attended = kernels.joint_attention(attn, image_normed, text_normed, image_rotary_emb)
    of_text_tokens, of_image_tokens = kernels.streams(attended, [text.shape[1], image.shape[1]])
    image_gate, *image_norm, image_mlp_gate = of_image[2:]
    text_gate, *text_norm, text_mlp_gate = of_text[2:]
    (image, image_normed), (text, text_normed) = kernels.gated_linears_adaln(
        [
            Gated(attn.to_out[0], of_image_tokens, image_gate, image),
            Gated(attn.to_add_out, of_text_tokens, text_gate, text),
        ],
        [(*image_norm, self.norm2.eps), (*text_norm, self.norm2_context.eps)],
    )
    image_hidden, text_hidden = kernels.gelu_linears(
        [(self.ff.net[0].proj, image_normed), (self.ff_context.net[0].proj, text_normed)]
    )
    image, text = kernels.gated_linears(
        [
            Gated(self.ff.net[2], image_hidden, image_mlp_gate, image),
            Gated(self.ff_context.net[2], text_hidden, text_mlp_gate, text),
        ]
    )
    return text, image


def single_block(
    self: FluxSingleTransformerBlock,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: Rotary,
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor]:
    """FluxSingleTransformerBlock.forward; returns the text and the image stream, two views of one tensor."""
    _refuse(joint_attention_kwargs)
    kernels, attn = self.kernels, self.attn
    image, text = hidden_states, encoder_hidden_states
    shift, scale, gate = _modulation(self.norm, temb, 3)
    normed = kernels.adaln(image, text, shift, scale, self.norm.norm.eps)
    attended = kernels.attention_and_mlp(attn, self.proj_qkv_mlp, normed, image_rotary_emb)
    joint = kernels.gated_linear(Gated(self.proj_out, attended, gate, image), text)
    text, image = joint.split([text.shape[1], image.shape[1]], dim=1)
    return text, image


def _refuse(joint_attention_kwargs: dict[str, Any] | None) -> None:
    if joint_attention_kwargs:
        name = next(iter(joint_attention_kwargs))
        raise NotImplementedError(f"fused kernels take no {name}: use a recipe with fused_kernels=false")


def _modulation(norm: Any, temb: Tensor, parts: int) -> tuple[Tensor, ...]:
    """`parts` of [batch, dim]: shift, scale and gate of the attention, then those of the feed-forward."""
    return norm.linear(norm.silu(temb)).chunk(parts, dim=1)


def _joint_attention(
    kernels: Kernels, attn: FluxAttention, image: Tensor | Rows, text: Tensor | Rows, rotary: Rotary
) -> Tensor | Rows:
    """A double block's attention over both streams."""
    image_qkv, text_qkv = kernels.linear(attn.to_qkv, image), kernels.linear(attn.to_added_qkv, text)
    return _attention(kernels, attn, image_qkv, text_qkv, rotary)


def _attention_and_mlp(
    kernels: Kernels, attn: FluxAttention, linear: nn.Module, x: Tensor | Rows, rotary: Rotary
) -> tuple[Tensor | Rows, Tensor]:
    """A single block's attention, and its MLP before GELU."""
    projected = kernels.linear(linear, x)
    width = 3 * attn.inner_dim
    return _attention(kernels, attn, projected[..., :width], None, rotary), projected[..., width:]


def _attention(
    kernels: Kernels, attn: FluxAttention, image: Tensor, text: Tensor | None, rotary: Rotary
) -> Tensor | Rows:
    """image and text [batch, tokens, 3 * dim], fused projections; returns [batch, tokens, dim], text first."""
    heads = (3, -1, attn.head_dim)
    image_qkv, text_qkv = image.unflatten(-1, heads), None if text is None else text.unflatten(-1, heads)
    added = (None, None) if text is None else (attn.norm_added_q.weight, attn.norm_added_k.weight)
    of_qkv = (image_qkv, text_qkv, attn.norm_q.weight, attn.norm_k.weight, *added, *rotary, attn.norm_q.eps)
    float8 = kernels.attention.float8
    if float8 is not None:
        query_key, value, descales = qkv.qkv_norm_rotary_float8(*of_qkv, float8.value_layout, float8.value_per_head)
        arguments = (query_key[:, :, 0], query_key[:, :, 1], value, descales)
        if float8.rows is not None and isinstance(kernels, Float8):
            values, scale = float8.rows(*arguments)
            return Rows(values.flatten(2, 3), scale)
        out = float8.attend(*arguments)
    else:
        parts = qkv.qk_norm_rotary(*of_qkv)
        value = (image_qkv if text is None else parts)[:, :, 2]
        out = kernels.attention.attend(parts[:, :, 0], parts[:, :, 1], value)
    return out.flatten(2, 3)
