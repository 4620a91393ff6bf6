"""Query, key and value in float8 (e4m3) for attention: a scale for each (batch, head), or one for all.

The values' layouts, by name: `by_token`, as they are; `tokens_innermost`; `for_wgmma`.
"""

from __future__ import annotations

import torch

E4M3_MAX = torch.finfo(torch.float8_e4m3fn).max  # 448
SMALLEST_AMAX = 1e-12  # what is all zeros has a scale too
# Of a row of query or key, before it is rounded: rounding makes at most 17/16 of each value, and a score is to be a
# float16, 65504 at most.
LONGEST = 224


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


def to_float8_by_norm(x: torch.Tensor, per_head: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """`to_float8` of query or key by its longest row, of each (batch, head) or of all, which comes to be `LONGEST`."""
    norm = torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32).amax(dim=1).clamp(min=SMALLEST_AMAX)
    if not per_head:
        norm = norm.amax().expand(norm.shape)
    scale = LONGEST / norm
    return (x.float() * scale[:, None, :, None]).to(torch.float8_e4m3fn), (norm / LONGEST).contiguous()


def tokens_innermost(x: torch.Tensor) -> torch.Tensor:
    """x [batch, tokens, heads, head_dim] float8_e4m3fn as [batch, heads, head_dim, tokens], the tokens' number padded
    with zeros to a multiple of 16."""
    by_bytes = x.view(torch.uint8).permute(0, 2, 3, 1)  # padding knows no float8
    return torch.nn.functional.pad(by_bytes, (0, -x.shape[1] % 16)).contiguous().view(x.dtype)


def for_wgmma(x: torch.Tensor) -> torch.Tensor:
    """x [batch, tokens, heads, 128] float8_e4m3fn as `tokens_innermost` gives it, [batch, heads, 128, tokens], but with
    tokens and channels in the order in which wgmma's operands have them.

    Of each 16 tokens a thread has scores for 2 q, 2 q + 1, 2 q + 8 and 2 q + 9, q being its number of four; as a left
    operand in float8 these are 4 q to 4 q + 3. Of the result's columns it has 8 i + 2 q and the next; which are to be
    channels 32 q + 2 i and the next.

    Source: PTX ISA, register fragments of wgmma.mma_async.
    """
    padded = tokens_innermost(x).view(torch.uint8)  # permuting knows no float8
    tokens = padded.unflatten(-1, (-1, 2, 4, 2)).transpose(-3, -2).flatten(-4)
    channels = tokens.unflatten(2, (4, 16, 2)).transpose(2, 3).flatten(2, 4)
    return channels.contiguous().view(x.dtype)


def lay_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    """Values [batch, tokens, heads, head_dim] float8_e4m3fn in the layout of that name."""
    return x if layout == "by_token" else {"tokens_innermost": tokens_innermost, "for_wgmma": for_wgmma}[layout](x)
