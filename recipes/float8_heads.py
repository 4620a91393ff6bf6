"""Query, key and value in float8 (e4m3) for attention: a scale for each (batch, head), or one for all."""

from __future__ import annotations

import torch

E4M3_MAX = torch.finfo(torch.float8_e4m3fn).max  # 448
SMALLEST_AMAX = 1e-12  # what is all zeros has a scale too


def to_float8(x: torch.Tensor, per_head: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale each (batch, head), or all of x together, to float8's range.

    x [batch, tokens, heads, head_dim]; returns it as float8_e4m3fn, and the descale [batch, heads] float32 with
    x = float8 * descale.
    """
    amax = x.abs().amax(dim=(1, 3)).float().clamp(min=SMALLEST_AMAX)
    if not per_head:
        amax = amax.amax().expand(amax.shape)
    scale = E4M3_MAX / amax
    return (x.float() * scale[:, None, :, None]).to(torch.float8_e4m3fn), (amax / E4M3_MAX).contiguous()


def tokens_innermost(x: torch.Tensor) -> torch.Tensor:
    """x [batch, tokens, heads, head_dim] float8_e4m3fn as [batch, heads, head_dim, tokens], the tokens' number padded
    with zeros to a multiple of 16."""
    by_bytes = x.view(torch.uint8).permute(0, 2, 3, 1)  # padding knows no float8
    return torch.nn.functional.pad(by_bytes, (0, -x.shape[1] % 16)).contiguous().view(x.dtype)
