"""cuDNN's float8 attention in plain PyTorch, for where there is no GPU to run it."""

from __future__ import annotations

import torch


def cudnn_attention_float8(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scalars: torch.Tensor
) -> torch.Tensor:
    """As `recipes.cudnn_attention.cudnn_attention_float8`."""
    descale_q, descale_k, descale_v, descale_s, scale_s, scale_o = scalars[:, 0]
    scores = torch.einsum("bqhd,bkhd->bhqk", query.float() * descale_q, key.float() * descale_k)
    scores *= query.shape[-1] ** -0.5
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    quantized = (weights * scale_s).to(torch.float8_e4m3fn).float() * descale_s
    out = torch.einsum("bhqk,bkhd->bqhd", quantized / weights.sum(-1, keepdim=True), value.float() * descale_v)
    return (out * scale_o).to(torch.float8_e4m3fn).contiguous()
