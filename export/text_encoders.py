"""CLIP's and T5's layers from packages of their own, which fit every size of image and all that is done to the rest.

T5's first layer makes the position bias of the others, and is a model of its own. A model takes one prompt at a time,
so that a package fits any number of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn
from transformers.models.clip.modeling_clip import CLIPEncoderLayer
from transformers.models.t5.modeling_t5 import T5Block

from export.regions import Region
from utils.errors import UserError

CLIP_LAYER = Region("clip_layer", "text_encoder", ("hidden_states",))
T5_FIRST_LAYER = Region("t5_first_layer", "text_encoder_2", ("hidden_states",))
T5_LAYER = Region("t5_layer", "text_encoder_2", ("hidden_states", "position_bias"))
TEXT_REGIONS = (CLIP_LAYER, T5_FIRST_LAYER, T5_LAYER)
COMPONENTS = (CLIP_LAYER.component, T5_LAYER.component)

# What comes after the hidden states where a layer is called by position; but for the bias, an encoder has none of it.
_OTHERS = (
    *("attention_mask", "position_bias", "encoder_hidden_states", "encoder_attention_mask"),
    *("encoder_decoder_position_bias",),
)


class _Layer(nn.Module):
    """A layer as it was before packages stood in for it."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer, self.run = layer, layer.forward


class _ClipLayer(_Layer):
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.run(hidden_states, None, is_causal=True)


class _T5FirstLayer(_Layer):
    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden_states, position_bias, *_ = self.run(hidden_states)
        return hidden_states, position_bias.contiguous()  # which every other layer would have to make it


class _T5Layer(_Layer):
    def forward(self, hidden_states: torch.Tensor, position_bias: torch.Tensor) -> torch.Tensor:
        return self.run(hidden_states, None, position_bias)[0]


class PackagedLayer:
    """Stands in for a layer's forward.

    region: gives of one prompt's hidden states [1, tokens, features] the layer's, and of T5's first the position bias
    [1, heads, tokens, tokens] besides.

    Raises:
        UserError: at a call with more than packages take, such as a mask.
    """

    def __init__(self, kind: Region, region: Callable[..., Any]):
        self.kind, self.region = kind, region

    def __call__(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        named = {**dict(zip(_OTHERS, args, strict=False)), **kwargs}
        named.pop("is_causal", None)  # of CLIP, always
        given = {name: value for name, value in named.items() if value is not None and value is not False}
        if "attention_mask" in given:
            raise UserError(
                f"packages: the packaged {self.kind.name} takes no attention_mask, which transformers before 5.23 "
                "makes in each capture of a CUDA graph: install 5.23, or use a recipe with execution=compile"
            )
        done = [self.region(hidden_states=one, **given) for one in hidden_states.split(1)]
        if self.kind is CLIP_LAYER:
            return _together(done)
        if self.kind is T5_LAYER:
            return _together(done), given["position_bias"], None
        return _together([hidden for hidden, _ in done]), done[0][1], None


def layers(pipe: DiffusionPipeline) -> Iterator[tuple[Region, nn.Module, nn.Module]]:
    """Of each layer its region, a module that takes the region's inputs, and the layer itself."""
    for layer in pipe.text_encoder.modules():
        if isinstance(layer, CLIPEncoderLayer):
            yield CLIP_LAYER, _ClipLayer(layer), layer
    for layer in pipe.text_encoder_2.modules():
        if isinstance(layer, T5Block):
            first = layer.layer[0].SelfAttention.has_relative_attention_bias
            yield (T5_FIRST_LAYER, _T5FirstLayer(layer), layer) if first else (T5_LAYER, _T5Layer(layer), layer)


def _together(of_prompts: list[torch.Tensor]) -> torch.Tensor:
    return of_prompts[0] if len(of_prompts) == 1 else torch.cat(of_prompts)
