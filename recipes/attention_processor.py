"""diffusers' Flux attention processor with an attention function of our own."""

from __future__ import annotations

from collections.abc import Callable

import torch
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_flux import FluxAttention, FluxAttnProcessor

# (query, key, value) [batch, tokens, heads, head_dim] -> the same shape and dtype, not causal.
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class Processor(FluxAttnProcessor):
    """Projections, RMSNorm and rotary embedding as diffusers has them, attention by `attend`."""

    def __init__(self, attend: Attend):
        super().__init__()
        self.attend = attend

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
            raise NotImplementedError("this attention takes no mask; Flux passes none")
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
        out = self.attend(query, key, value).flatten(2, 3)
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
