"""FlashAttention-3 in float8 (e4m3), as a custom op that torch.compile and torch.export take whole.

Source: Shah et al., arXiv 2407.08608; `flash_attn_func` of the module `flash_attn_interface`, folder `hopper` of
Dao-AILab/flash-attention. Unlike huggingface/flux-fast, which casts unscaled, each (batch, head) gets its own scale,
and its inverse goes to the kernel as descale.
"""

from __future__ import annotations

import torch
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_flux import FluxAttention, FluxAttnProcessor

E4M3_MAX = torch.finfo(torch.float8_e4m3fn).max  # 448


def to_float8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale each (batch, head) to float8's range.

    x [batch, tokens, heads, head_dim]; returns it as float8_e4m3fn, and the descale [batch, heads] float32 with
    x = float8 * descale.
    """
    amax = x.abs().amax(dim=(1, 3)).float().clamp(min=1e-12)
    scale = E4M3_MAX / amax
    return (x.float() * scale[:, None, :, None]).to(torch.float8_e4m3fn), amax / E4M3_MAX


@torch.library.custom_op("flux_fast::flash_attention_3_fp8", mutates_args=())
def flash_attention_3_fp8(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Attention over [batch, tokens, heads, head_dim], not causal; returns the query's shape and dtype."""
    from flash_attn_interface import flash_attn_func

    (q, q_descale), (k, k_descale), (v, v_descale) = (to_float8(x) for x in (query, key, value))
    out = flash_attn_func(q, k, v, q_descale=q_descale, k_descale=k_descale, v_descale=v_descale)
    out = out[0] if isinstance(out, tuple) else out  # its first betas returned the log-sum-exp too
    return out.to(query.dtype)


@flash_attention_3_fp8.register_fake
def _(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(query, memory_format=torch.contiguous_format)


class Processor(FluxAttnProcessor):
    """diffusers' Flux attention processor, its attention computed by the op above."""

    def __call__(
        self,
        attn: FluxAttention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """hidden_states [batch, tokens, dim]; the double blocks' text stream comes as encoder_hidden_states."""
        if attention_mask is not None:
            raise NotImplementedError("FlashAttention-3 takes no attention mask; Flux passes none")
        query, key, value = _project(attn, hidden_states, "to_qkv", ("to_q", "to_k", "to_v"))
        query, key = attn.norm_q(query), attn.norm_k(key)
        text_tokens = 0
        if encoder_hidden_states is not None:
            names = ("add_q_proj", "add_k_proj", "add_v_proj")
            text_query, text_key, text_value = _project(attn, encoder_hidden_states, "to_added_qkv", names)
            text_tokens = text_query.shape[1]
            query = torch.cat([attn.norm_added_q(text_query), query], dim=1)
            key = torch.cat([attn.norm_added_k(text_key), key], dim=1)
            value = torch.cat([text_value, value], dim=1)
        if image_rotary_emb is not None:
            query = apply_rotary_emb(query, image_rotary_emb, sequence_dim=1)
            key = apply_rotary_emb(key, image_rotary_emb, sequence_dim=1)
        out = flash_attention_3_fp8(query, key, value).flatten(2, 3)
        if encoder_hidden_states is None:
            return out
        text, image = out[:, :text_tokens], out[:, text_tokens:]
        return attn.to_out[1](attn.to_out[0](image)), attn.to_add_out(text)


def _project(
    attn: FluxAttention, x: torch.Tensor, fused: str, separate: tuple[str, str, str]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k and v, each [batch, tokens, heads, head_dim]."""
    if attn.fused_projections:
        parts = getattr(attn, fused)(x).chunk(3, dim=-1)
    else:
        parts = tuple(getattr(attn, name)(x) for name in separate)
    q, k, v = (part.unflatten(-1, (-1, attn.head_dim)) for part in parts)
    return q, k, v
