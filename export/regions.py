"""What is compiled once each: the two kinds of block, what lies before and after the blocks, and the VAE's decoder.

A region's model takes tensors by name and nothing else. What a module is called with besides has to be nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from diffusers import DiffusionPipeline, FluxTransformer2DModel
from torch import nn
from torch.utils import _pytree as pytree

from recipes import hoisting
from utils.errors import UserError

Inputs = dict[str, Any]  # by name, in the region's order: a tensor, or a tuple of tensors
Key = tuple


@dataclass(frozen=True)
class Region:
    """A part of the pipeline: `inputs`, the names of what its model may take, in the order in which it takes them.

    component: the part of the pipeline whose configuration decides what it looks like. slower_over_ranges: a model for
    a range of sizes takes notably longer than one of a fixed size (`benchmark.dynamic_shapes`).
    """

    name: str
    component: str
    inputs: tuple[str, ...]
    slower_over_ranges: bool = False

    @property
    def is_block(self) -> bool:
        return self in (DOUBLE_BLOCK, SINGLE_BLOCK)

    def arguments(self, args: tuple, kwargs: dict[str, Any]) -> Inputs:
        """A call's arguments as the model takes them: by name, without those that are None, laid out alike.

        Raises:
            UserError: an argument that no model takes.
        """
        given = {**dict(zip(self.inputs, args, strict=False)), **kwargs}
        others = [name for name, value in given.items() if name not in self.inputs and value not in (None, {}, ())]
        if others or len(args) > len(self.inputs):
            other = others[0] if others else f"argument {len(self.inputs) + 1}"
            raise UserError(f"packages: the packaged {self.name} takes no {other}: use a recipe with execution=compile")
        named = {name: given[name] for name in self.inputs if given.get(name) is not None}
        return _views_of_one(named) if self is SINGLE_BLOCK else pytree.tree_map(_contiguous, named)


BEFORE = Region(
    "before",
    "transformer",
    ("hidden_states", "encoder_hidden_states", "txt_ids", "img_ids", "timestep", "guidance", "pooled_projections"),
)
DOUBLE_BLOCK = Region(
    "double_block", "transformer", ("hidden_states", "encoder_hidden_states", "temb", "image_rotary_emb")
)
SINGLE_BLOCK = Region("single_block", "transformer", DOUBLE_BLOCK.inputs)
AFTER = Region("after", "transformer", ("hidden_states", "temb"))
WHOLE = Region("transformer", "transformer", ("context", "rotary", "modulation", *BEFORE.inputs))
DECODER = Region("vae_decoder", "vae", ("sample",), slower_over_ranges=True)
REGIONS = {region.name: region for region in (BEFORE, DOUBLE_BLOCK, SINGLE_BLOCK, AFTER, WHOLE, DECODER)}


class Around(nn.Module):
    """What lies before or after the blocks, with the transformer's own `parts`."""

    parts: tuple[str, ...]

    def __init__(self, transformer: FluxTransformer2DModel):
        super().__init__()
        self._transformer = (transformer,)  # in a tuple, or it would be one of the parts
        self.take_parts()

    def take_parts(self) -> None:
        """Have those that the transformer has by now."""
        for name in self.parts:
            setattr(self, name, getattr(self._transformer[0], name))


class Before(Around):
    parts = ("x_embedder", "context_embedder", "time_text_embed", "pos_embed")
    forward = hoisting.before


class After(Around):
    parts = ("norm_out", "proj_out")
    forward = hoisting.after


class Whole(nn.Module):
    """The transformer as one region."""

    def __init__(self, transformer: FluxTransformer2DModel):
        super().__init__()
        self.transformer = transformer

    def forward(
        self,
        *,
        context: torch.Tensor | None = None,
        rotary: hoisting.Rotary | None = None,
        modulation: torch.Tensor | None = None,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        txt_ids: torch.Tensor | None = None,
        img_ids: torch.Tensor | None = None,
        timestep: torch.Tensor | None = None,
        guidance: torch.Tensor | None = None,
        pooled_projections: torch.Tensor | None = None,
    ) -> torch.Tensor:
        before, after = partial(hoisting.before, self.transformer), partial(hoisting.after, self.transformer)
        return hoisting.run(
            self.transformer,
            before,
            after,
            context=context,
            rotary=rotary,
            modulation=modulation,
            hidden_states=hidden_states,
            encoder_hidden_states=encoder_hidden_states,
            txt_ids=txt_ids,
            img_ids=img_ids,
            timestep=timestep,
            guidance=guidance,
            pooled_projections=pooled_projections,
            return_dict=False,
        )[0]


def modules(pipe: DiffusionPipeline, scope: str) -> list[tuple[Region, nn.Module]]:
    """Every module that a package's model stands in for; `scope`: the recipe's compile_scope.

    The VAE's decoder, where the pipeline has one, is the last.
    """
    transformer = pipe.transformer
    if scope == "whole":
        of_transformer: list[tuple[Region, nn.Module]] = [(WHOLE, Whole(transformer))]
    else:
        of_transformer = [
            (BEFORE, Before(transformer)),
            *((DOUBLE_BLOCK, block) for block in transformer.transformer_blocks),
            *((SINGLE_BLOCK, block) for block in transformer.single_transformer_blocks),
            (AFTER, After(transformer)),
        ]
    vae = getattr(pipe, "vae", None)
    return of_transformer if vae is None else [*of_transformer, (DECODER, vae.decoder)]


def key(inputs: Inputs) -> Key:
    """What a model is specialised to: which inputs, and of each tensor its shape, strides, dtype and device."""
    return tuple(
        (name, *((x.shape, strides(x), x.dtype, x.device) for x in pytree.tree_leaves(value)))
        for name, value in inputs.items()
    )


def strides(tensor: torch.Tensor) -> tuple[int, ...]:
    """A tensor's strides; of a contiguous one what they would be if no size was 1, where any stride would do."""
    if not tensor.is_contiguous():
        return tensor.stride()
    return contiguous_strides(tuple(tensor.shape))


def contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    result, size = [], 1
    for side in reversed(shape):
        result.append(size)
        size *= side
    return tuple(reversed(result))


def is_tensors(value: Any) -> bool:
    """Whether a value is a tensor or a tuple of them."""
    return value is not None and all(isinstance(leaf, torch.Tensor) for leaf in pytree.tree_leaves(value))


def _contiguous(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        raise UserError(f"packages take tensors, not {value!r}: use a recipe with execution=compile")
    return value.contiguous()


def _views_of_one(inputs: Inputs) -> Inputs:
    """Text and image stream as two views of one tensor, as a single block gives them to the next one.

    The first single block gets them from the double blocks as two tensors, which would be another kind of input. Of a
    batch of one both are contiguous, and nothing has to be done.
    """
    text, image = inputs["encoder_hidden_states"], inputs["hidden_states"]
    rest = pytree.tree_map(_contiguous, {name: inputs[name] for name in inputs if name in ("temb", "image_rotary_emb")})
    tokens = [text.shape[1], image.shape[1]]
    apart = (text.is_contiguous() and image.is_contiguous()) or text.stride() != image.stride()
    if text.shape[0] > 1 and apart:
        text, image = torch.cat([text, image], dim=1).split(tokens, dim=1)
    return {"hidden_states": image, "encoder_hidden_states": text, **rest}
