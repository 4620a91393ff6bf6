"""What lies where in a scene, as labels of the transformer's image tokens: a second thing to learn while training.

From the middle of the transformer a linear head, thrown away after training, tells for every image token which shape
and which colour it belongs to and where that object's centre is. Where the noise hides the image only the text can
tell, so that this teaches to bind shapes, colours and places from the captions, which the velocity's error, made of
16 latent channels of flat colour mostly, teaches slowly. An idea of REPA (arXiv 2410.06940), with the renderer's
knowledge in place of another network's features.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from tiny_flux.scenes import BACKGROUNDS, COLORS, IMAGE_SIZE, SHAPES

TOKENS = 16  # image tokens a side
_PITCH = IMAGE_SIZE / TOKENS
_NO_SHAPE = len(SHAPES)
_PALETTE = len(COLORS) + len(BACKGROUNDS)
_UNIT = 32.0  # pixels, of offsets and radii


def layout(
    background: torch.Tensor, geometry: torch.Tensor, shape: torch.Tensor, color: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Labels of the 256 image tokens of n scenes of at most k objects.

    background [n] indices into BACKGROUNDS; geometry [n, k, 3] as (x, y, radius) in pixels; shape and color [n, k]
    indices into SHAPES and COLORS. Returns the shape (int64 [n, 256], len(SHAPES) where there is none), the colour
    (int64 [n, 256], the backgrounds after COLORS) and (x, y) of the object's centre seen from the token and its radius
    (float32 [n, 256, 3], in 32 pixels, 0 where there is none). A token belongs to the object in whose radius its
    centre lies; objects don't overlap.
    """
    middle = (torch.arange(TOKENS, device=geometry.device) + 0.5) * _PITCH
    y, x = (v.flatten()[None, :, None] for v in torch.meshgrid(middle, middle, indexing="ij"))
    dx, dy, radius = (geometry[:, None, :, 0] - x, geometry[:, None, :, 1] - y, geometry[:, None, :, 2])
    within, owner = (radius - torch.hypot(dx, dy)).max(-1)  # how far inside, and of which object
    owned = within > 0
    shapes = torch.where(owned, shape.long().gather(1, owner), _NO_SHAPE)
    colors = torch.where(owned, color.long().gather(1, owner), len(COLORS) + background.long()[:, None])
    offsets = torch.stack([dx, dy, radius.expand_as(dx)], -1).gather(2, owner[..., None, None].expand(-1, -1, 1, 3))
    return shapes, colors, offsets[:, :, 0] / _UNIT * owned[..., None]


class LayoutHead(nn.Linear):
    """Reads the layout off hidden states [n, 256, features]."""

    def __init__(self, features: int):
        super().__init__(features, _NO_SHAPE + 1 + _PALETTE + 3)

    def loss(self, hidden: torch.Tensor, labels: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """Cross entropy of shape and colour, and the L1 error of centre and radius where there is an object."""
        shapes, colors, offsets = labels
        shape, color, offset = self(hidden).float().split((_NO_SHAPE + 1, _PALETTE, 3), dim=-1)
        owned = (shapes != _NO_SHAPE)[..., None]
        return (
            F.cross_entropy(shape.flatten(0, 1), shapes.flatten())
            + F.cross_entropy(color.flatten(0, 1), colors.flatten())
            + ((offset - offsets).abs() * owned).mean()
        )
