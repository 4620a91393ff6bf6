"""A denoising step without what no step changes: that is computed before the loop, and handed to each step.

`pipe(prompt)` stays as it is. A hook before each call of the transformer swaps arguments (the prompt's embeddings, the
position ids, the timestep) for what they come to, which is remembered for as long as the same tensors come; the
transformer's forward becomes `step`, which takes either. What compiles, captures or exports the forward gets the step.

Source: FluxTransformer2DModel.forward of diffusers.
"""

from __future__ import annotations

import functools
import inspect
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from types import MethodType
from typing import Any, Generic, TypeVar

import torch
from diffusers import DiffusionPipeline, FluxTransformer2DModel
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch.utils import _pytree as pytree

from utils.errors import UserError
from utils.mixin import mix_in

Result = TypeVar("Result")
Rotary = tuple[torch.Tensor, ...]
Replace = Callable[[dict[str, Any]], dict[str, Any]]
_REMEMBERED, _HOISTED, _CALL = "_remembered", "_hoisted", "_ends_with_call"


class Remembered(Generic[Result]):
    """A function that remembers its last two results, by the very objects it was called with.

    Two, because true classifier-free guidance has two prompts a step. A tensor written to in place since, or given
    other memory, is another one; one of inference mode, which counts no versions, is never remembered, nor is a result
    that autograd follows.
    """

    def __init__(self, function: Callable[..., Result]):
        self.function = function
        self._last: deque[tuple[tuple, list[tuple[int, int]], Result]] = deque(maxlen=2)

    def __call__(self, *arguments: Any) -> Result:
        tensors = [x for x in arguments if isinstance(x, torch.Tensor)]
        followed = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
        if followed or any(tensor.is_inference() for tensor in tensors):
            return self.function(*arguments)
        versions = [(tensor._version, tensor.data_ptr()) for tensor in tensors]
        for known, known_versions, result in self._last:
            if known_versions == versions and all(a is b for a, b in zip(known, arguments, strict=True)):
                return result
        result = self.function(*arguments)
        self._last.append((arguments, versions, result))
        return result

    def forget(self) -> None:
        self._last.clear()


class Hoisted(Generic[Result]):
    """A function of tensors on the transformer's device, and of nothing else that changes but weights in their place.

    What captures calls (recipes/cuda_graph.py) puts a graph in place of `function`.
    """

    def __init__(self, name: str, function: Callable[..., Result]):
        self.name, self.function = name, function

    def __call__(self, *arguments: Any) -> Result:
        return self.function(*arguments)


def hoist(
    transformer: FluxTransformer2DModel,
    replace: Replace,
    remembered: Sequence[Remembered] = (),
    hoisted: Sequence[Hoisted] = (),
) -> None:
    """Before each call of `transformer`, `replace` its arguments, by name; its forward becomes `step`.

    replace: gives the arguments as `step` takes them, and leaves alone those that it has replaced already.
    remembered: what `replace` remembers of the transformer's layers, for `forget`. hoisted: what it computes with them.
    """
    for name, more in ((_REMEMBERED, remembered), (_HOISTED, hoisted)):
        setattr(transformer, name, [*getattr(transformer, name, ()), *more])

    def hook(module: FluxTransformer2DModel, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        return (), replace(by_name(args, kwargs))

    transformer.forward = MethodType(step, transformer)
    transformer.register_forward_pre_hook(hook, with_kwargs=True)


def end_with_call(pipe: DiffusionPipeline) -> None:
    """Let what is hoisted last for a call of the pipeline, whatever it is called in and however it ends.

    A call that is broken off leaves its loop as one that ends does: diffusers would keep its current timestep, by which
    a call of the transformer by hand is told from one of the loop. In inference mode, whose tensors count no versions,
    nothing would be remembered from one step to the next: there a call runs without gradients instead, with copies of
    the tensors that it is given. Weights that were loaded in inference mode still aren't remembered.
    """
    if _CALL in vars(pipe):
        return
    setattr(pipe, _CALL, True)
    kind = type(pipe)

    @functools.wraps(kind.__call__)
    def call(self: DiffusionPipeline, *args: Any, **kwargs: Any) -> Any:
        with ExitStack() as stack:
            if torch.is_inference_mode_enabled():
                stack.enter_context(torch.inference_mode(False))
                stack.enter_context(torch.no_grad())
                args, kwargs = pytree.tree_map_only(torch.Tensor, _countable, (args, kwargs))
            try:
                return kind.__call__(self, *args, **kwargs)
            finally:
                self._current_timestep = None

    mix_in(pipe, __call__=call)


def _countable(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor whose versions are counted, with the same values."""
    return tensor.clone() if tensor.is_inference() else tensor


def hoisted(transformer: FluxTransformer2DModel) -> list[Hoisted]:
    """What is computed before the loop, of all that was hoisted out of `transformer`'s calls."""
    return getattr(transformer, _HOISTED, [])


def forget(transformer: FluxTransformer2DModel) -> None:
    """Compute what is hoisted anew at the next call: the transformer's weights were written to."""
    for remembered in getattr(transformer, _REMEMBERED, ()):
        remembered.forget()


def by_name(args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a call of the transformer by name."""
    return {**dict(zip(_names(), args, strict=False)), **kwargs}


@functools.cache  # the host would spend a twentieth of a step on it
def _names() -> tuple[str, ...]:
    return tuple(inspect.signature(FluxTransformer2DModel.forward).parameters)[1:]


def step(self: FluxTransformer2DModel, *args: Any, **kwargs: Any) -> Any:
    """FluxTransformer2DModel.forward, which computes what it isn't given: `run` with the transformer's own layers."""
    return run(self, partial(before, self), partial(after, self), *args, **kwargs)


def run(
    transformer: FluxTransformer2DModel,
    before: Callable[..., dict[str, Any]],
    after: Callable[..., torch.Tensor],
    hidden_states: torch.Tensor,
    context: torch.Tensor | None = None,
    rotary: Rotary | None = None,
    modulation: torch.Tensor | None = None,
    encoder_hidden_states: torch.Tensor | None = None,
    pooled_projections: torch.Tensor | None = None,
    timestep: torch.Tensor | None = None,
    img_ids: torch.Tensor | None = None,
    txt_ids: torch.Tensor | None = None,
    guidance: torch.Tensor | None = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
    return_dict: bool = True,
    **others: Any,
) -> Any:
    """A denoising step: what lies before the blocks, the transformer's blocks, what lies after them.

    hidden_states [batch, image tokens, in_channels]. Hoisted: `context` [batch, text tokens, dim] is the context
    embedder's output, `rotary` what pos_embed gives, as cosines and sines [tokens, head_dim] in float32, `modulation`
    [batch, width] the output of every AdaLN's Linear, side by side in the order of `modulated`. The rest as diffusers
    has it.
    before, after: as the functions of these names, without the transformer.

    Raises:
        UserError: ControlNet's or an IP-Adapter's arguments, or a LoRA's scale.
    """
    unsupported = [name for name, value in others.items() if value is not None and value is not False]
    unsupported += joint_attention_kwargs or ()
    if unsupported:
        raise UserError(
            f"this recipe's denoising step takes no {unsupported[0]}: use a recipe with modulation=per_step, "
            "hoisted_embeddings=false and execution=eager or compile"
        )
    needed: dict[str, torch.Tensor | None] = {"hidden_states": hidden_states}
    if context is None:
        needed |= {"encoder_hidden_states": encoder_hidden_states}
    if rotary is None:
        needed |= {"txt_ids": txt_ids, "img_ids": img_ids}
    if modulation is None:
        needed |= {"timestep": timestep, "guidance": guidance, "pooled_projections": pooled_projections}
    made = before(**{name: tensor for name, tensor in needed.items() if tensor is not None})
    hidden_states, context = made["hidden_states"], made.get("context", context)
    rotary = made.get("rotary", rotary)
    if modulation is None:
        rows: tuple[torch.Tensor, ...] = (made["conditioning"],) * len(modulated(transformer))
    else:
        widths = [sum(linear.out_features for linear in group) for group in modulated(transformer)]
        rows = modulation.split(widths, dim=1)
    *of_blocks, of_out = rows
    blocks = (*transformer.transformer_blocks, *transformer.single_transformer_blocks)
    for block, row in zip(blocks, of_blocks, strict=True):
        context, hidden_states = block(
            hidden_states=hidden_states, encoder_hidden_states=context, temb=row, image_rotary_emb=rotary
        )
    sample = after(hidden_states=hidden_states, temb=of_out)
    return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)


def before(
    transformer: Any,
    hidden_states: torch.Tensor,
    encoder_hidden_states: torch.Tensor | None = None,
    txt_ids: torch.Tensor | None = None,
    img_ids: torch.Tensor | None = None,
    timestep: torch.Tensor | None = None,
    guidance: torch.Tensor | None = None,
    pooled_projections: torch.Tensor | None = None,
) -> dict[str, Any]:
    """What the blocks take, of what is given: `hidden_states` and `context` [batch, tokens, dim], `rotary`, and
    `conditioning` [batch, dim]. transformer: a FluxTransformer2DModel, or whatever has its embedders."""
    made: dict[str, Any] = {"hidden_states": transformer.x_embedder(hidden_states)}
    if encoder_hidden_states is not None:
        made["context"] = transformer.context_embedder(encoder_hidden_states)
    if txt_ids is not None and img_ids is not None:
        made["rotary"] = rotary_table(transformer, txt_ids, img_ids)
    if timestep is not None and pooled_projections is not None:
        made["conditioning"] = conditioning(transformer, timestep, guidance, pooled_projections)
    return made


def after(transformer: Any, hidden_states: torch.Tensor, temb: torch.Tensor) -> torch.Tensor:
    """The predicted velocity [batch, image tokens, out channels]; `transformer` as for `before`."""
    return transformer.proj_out(transformer.norm_out(hidden_states, temb))


def conditioning(
    transformer: Any,
    timestep: torch.Tensor,
    guidance: torch.Tensor | None,
    pooled_projections: torch.Tensor,
) -> torch.Tensor:
    """The vectors that modulate a step, [n, dim], of timesteps [n] in 0..1, guidance [n] and prompts [n, features]."""
    dtype = transformer.x_embedder.weight.dtype  # rounded as upstream rounds it
    times = timestep.to(dtype) * 1000
    if guidance is None:
        return transformer.time_text_embed(times, pooled_projections)
    return transformer.time_text_embed(times, guidance.to(dtype) * 1000, pooled_projections)


def rotary_table(transformer: Any, txt_ids: torch.Tensor, img_ids: torch.Tensor) -> Rotary:
    """What pos_embed gives, cosines and sines, for the text's and the image's position ids [tokens, 3]."""
    if txt_ids.ndim != 2 or img_ids.ndim != 2:
        raise UserError(f"position ids are [tokens, 3], not {list(txt_ids.shape)} and {list(img_ids.shape)}")
    return transformer.pos_embed(torch.cat((txt_ids, img_ids), dim=0))


def modulated(transformer: FluxTransformer2DModel) -> list[tuple[Any, ...]]:
    """The AdaLN's Linears: those of each double block, of each single block, and the one before the output."""
    return [
        *((block.norm1.linear, block.norm1_context.linear) for block in transformer.transformer_blocks),
        *((block.norm.linear,) for block in transformer.single_transformer_blocks),
        (transformer.norm_out.linear,),
    ]
