"""What a pipeline with a recipe refuses: diffusers' ways to change it that would go by the recipe.

Blocks whose weights were fused know no LoRA for the separate ones, a compiled function runs the modules that it was
made of and not their copies, weights that were offloaded aren't where a CUDA graph reads them: some of it would draw
another image without a word. So the methods are refused where they are called, in words that say what to do.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NoReturn

from diffusers import DiffusionPipeline
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from utils.components import modules
from utils.errors import UsageError

_OFFLOADING = ("enable_model_cpu_offload", "enable_sequential_cpu_offload", "enable_group_offload")


def hooked(pipe: DiffusionPipeline) -> str | None:
    """The first component in whose calls accelerate or diffusers was told to do more (offloading, layerwise casting,
    caching); None if there is none."""
    for name, part in modules(pipe).items():
        for module in part.modules():
            registry = getattr(module, "_diffusers_hook", None)
            if hasattr(module, "_hf_hook") or (registry is not None and registry.hooks):
                return name
    return None


def has_lora(pipe: DiffusionPipeline) -> bool:
    """Whether the transformer has peft's layers, fused or not."""
    return any(hasattr(module, "base_layer") for module in pipe.transformer.modules())


def other_attention(pipe: DiffusionPipeline) -> str | None:
    """The first kind of the transformer's attention processors that isn't diffusers' plain one."""
    kinds = (type(processor) for processor in pipe.transformer.attn_processors.values())
    return next((kind.__name__ for kind in kinds if kind is not FluxAttnProcessor), None)


def weight_names(pipe: DiffusionPipeline) -> dict[str, list[str]]:
    """Of each component its weights' names, as diffusers' files have them; none of those in another format."""
    return {
        name: [n for n, weight in part.state_dict().items() if not is_traceable_wrapper_subclass(weight)]
        for name, part in modules(pipe).items()
    }


def refuse_lora(pipe: DiffusionPipeline) -> None:
    _refuse(
        [pipe.transformer],
        ("load_lora_adapter", "add_adapter"),
        "a LoRA would miss what the recipe made of the weights: use export.lora.Adapter(pipe, checkpoint).load(file), "
        "or load the pipeline again and call load_lora_weights, fuse_lora and unload_lora_weights before the recipe",
    )


def refuse_hooks(pipe: DiffusionPipeline, cache: bool) -> None:
    """cache: whether caching is one of them."""
    names = (*_OFFLOADING, "enable_layerwise_casting", *(("enable_cache",) if cache else ()))
    _refuse(
        [pipe, *modules(pipe).values()],
        names,
        "what it compiled, captured or hoisted needs its weights where they are, as they are, and with "
        "hook_search_removal=true nobody looks for hooks: to save memory use a recipe with "
        "quantization=float8_per_row, modulation=offloaded or float8_text_encoder=true",
    )


def refuse_copies(pipe: DiffusionPipeline) -> None:
    _refuse(
        modules(pipe).values(),
        ("__deepcopy__",),
        "a copy would run the weights of the original: copy the pipeline before the recipe, and apply it to both",
    )


def refuse_saving(pipe: DiffusionPipeline, before: dict[str, list[str]]) -> None:
    """Of components whose weights aren't as they were `before` the recipe (`weight_names`), and so of the pipeline."""
    parts, after = modules(pipe), weight_names(pipe)
    changed = [parts[name] for name in parts if after[name] != before[name]]
    _refuse(
        [pipe, *changed] if changed else [],
        ("save_pretrained",),
        "from_pretrained could not read the weights that the recipe fused or quantized: save the pipeline before it",
    )


def _refuse(owners: Iterable[Any], names: tuple[str, ...], reason: str) -> None:
    """Let these methods of `owners` raise UsageError, where they have them."""
    for owner in owners:
        for name in names:
            if name == "__deepcopy__" or hasattr(owner, name):
                setattr(owner, name, _Refused(name, reason))


class _Refused:
    """Stands in for a method."""

    def __init__(self, name: str, reason: str):
        self.name, self.reason = name, reason

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise UsageError(
            f"{'copy.deepcopy' if self.name == '__deepcopy__' else self.name} after a recipe: {self.reason}"
        )
