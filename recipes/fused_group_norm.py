"""The VAE's decoder with GroupNorm and SiLU in one Triton kernel: in eager PyTorch half of its time at 1024x1024.

Where a convolution lies before it, with its bias: Inductor adds that in a pass over memory of its own.
"""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from recipes.optimization import Needs, Optimization
from recipes.recipe import Recipe


class WithoutBias(nn.Conv2d):
    """A convolution that leaves adding its bias to what gets its output."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._conv_forward(x, self.weight, None)


class GroupNormSiLU(nn.Module):
    """Stands where a GroupNorm stood, and does the SiLU behind it, too; weight and bias keep their names.

    before: the convolution whose output it gets, which becomes one without bias, for that is added here.
    """

    def __init__(self, norm: nn.GroupNorm, before: nn.Conv2d | None = None):
        super().__init__()
        self.weight, self.bias, self.groups, self.eps = norm.weight, norm.bias, norm.num_groups, norm.eps
        self._before = [before]  # in a list, so that its weights aren't this module's as well
        if before is not None:
            before.__class__ = WithoutBias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [batch, channels, height, width]; gives the same, in channels_last."""
        from recipes.kernels.group_norm import group_norm  # needs triton, which only a machine with a GPU has

        (before,) = self._before
        added = None if before is None else before.bias
        return group_norm(x, self.weight, self.bias, self.groups, self.eps, True, added)


def fuse(vae: AutoencoderKL) -> int:
    """Replace the decoder's GroupNorms that a SiLU follows; gives their number. That of the attention stays."""
    decoder = vae.decoder
    blocks = [module for module in decoder.modules() if isinstance(module, ResnetBlock2D)]
    for block in blocks:
        block.norm1, block.norm2 = GroupNormSiLU(block.norm1), GroupNormSiLU(block.norm2, block.conv1)
        block.nonlinearity = nn.Identity()
    decoder.conv_norm_out, decoder.conv_act = GroupNormSiLU(decoder.conv_norm_out), nn.Identity()
    return 2 * len(blocks) + 1


def _apply(pipe: DiffusionPipeline, recipe: Recipe) -> str:
    return f"{fuse(pipe.vae)} GroupNorms of the VAE's decoder, each with its SiLU"


OPTIMIZATION = Optimization(
    field="fused_group_norm",
    needs=lambda recipe: Needs(device="cuda", capability=(8, 0), packages=("triton",)),
    lossless=lambda recipe: True,
    apply=_apply,
    components=("vae",),
)
