"""The VAE's attention as GEMMs: one head of 512 channels, for which PyTorch has no kernel that is fast on a GPU.

Flash attention ends at heads of 256; the kernel that takes wider ones reaches 137 TFLOP/s on an H200, 4 of the 27 ms
that decoding to 1024x1024 took. Two GEMMs and a softmax between them take 1.6, though scores go through memory. They
are computed for a quarter of the pixels at a time, so that a quarter of them is there at once (all, in a package for a
range of sizes).

Source: Attention and AttnProcessor2_0 of diffusers.
"""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from diffusers.models.attention_processor import Attention

from recipes.optimization import Needs, Optimization
from recipes.recipe import Recipe

_PARTS = 4


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Attention of one head, each [batch, tokens, channels]; the result as well, in their dtype."""
    keys, scale, tokens = key.transpose(1, 2), query.shape[-1] ** -0.5, query.shape[1]
    # A compiler that is to leave their number open can't know that no part is empty.
    parts = query.tensor_split(_PARTS, dim=1) if isinstance(tokens, int) else [query]
    return torch.cat([((part @ keys) * scale).softmax(dim=-1) @ value for part in parts], dim=1)


class GEMMAttention:
    """A processor of diffusers' `Attention` between pixels of an image, with one head."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: None = None,
        attention_mask: None = None,
        temb: None = None,
    ) -> torch.Tensor:
        """hidden_states [batch, channels, height, width]; gives the same. Of the others a VAE has none."""
        height, width = hidden_states.shape[2:]
        x = attn.group_norm(hidden_states.flatten(2)).transpose(1, 2)
        if attn.fused_projections:
            query, key, value = attn.to_qkv(x).chunk(3, dim=-1)
        else:
            query, key, value = attn.to_q(x), attn.to_k(x), attn.to_v(x)
        out = attn.to_out[0](attend(query, key, value))
        return (hidden_states + out.transpose(1, 2).unflatten(2, (height, width))) / attn.rescale_output_factor


def _attentions(vae: AutoencoderKL) -> list[Attention]:
    return [module for module in vae.decoder.modules() if isinstance(module, Attention)]


def _apply(pipe: DiffusionPipeline, recipe: Recipe) -> str:
    attentions = _attentions(pipe.vae)
    for attn in attentions:
        attn.set_processor(GEMMAttention())
    return f"{len(attentions)} attention of the VAE's decoder"


OPTIMIZATION = Optimization(
    field="vae_attention",
    needs=lambda recipe: Needs(device="cuda"),
    lossless=lambda recipe: True,
    apply=_apply,
    components=("vae",),
)
