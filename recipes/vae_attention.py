"""The VAE's attention as GEMMs: one head of 512 channels, for which PyTorch has no kernel that is fast on a GPU.

Flash attention ends at heads of 256; the kernel that takes wider ones is of an older kind of GPU. Here scores go
through memory, some rows of them at a time, in float32 as inside of that kernel.

Source: Attention and AttnProcessor2_0 of diffusers.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DiffusionPipeline
from diffusers.models.attention_processor import Attention

from recipes.optimization import Needs, Optimization
from recipes.recipe import Recipe

_SCORES = 2**26  # there at a time: 256 MiB


@torch.library.custom_op("flux_fast::mm_float32", mutates_args=())
def mm_float32(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The product of matrices of one dtype, in float32.

    An op of its own, for packages have no way to call torch.mm with `out_dtype` in all versions of PyTorch, nor a CPU.
    """
    if a.device.type == "cpu" or a.dtype == torch.float32:
        return a.float() @ b.float()
    return torch.mm(a, b, out_dtype=torch.float32)


@mm_float32.register_fake
def _(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return a.new_empty((a.shape[0], b.shape[1]), dtype=torch.float32)


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Attention of one head, each [batch, tokens, channels]; the result as well, in their dtype.

    Where a compiler is to leave the number of tokens open, PyTorch's: there is no saying how many scores fit.
    """
    tokens = query.shape[1]
    if not isinstance(tokens, int):
        return F.scaled_dot_product_attention(query[:, None], key[:, None], value[:, None])[:, 0]
    parts = -(-(tokens**2) // _SCORES)
    return torch.stack(
        [
            torch.cat([_rows(part, k, v) for part in q.tensor_split(parts)])
            for q, k, v in zip(query.unbind(), key.unbind(), value.unbind(), strict=True)
        ]
    )


def _rows(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Of some tokens [rows, channels] to all [tokens, channels]."""
    scores = mm_float32(query, key.t()) * query.shape[-1] ** -0.5
    return scores.softmax(dim=-1).to(value.dtype) @ value


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
