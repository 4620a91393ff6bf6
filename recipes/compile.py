"""torch.compile, whole graphs only, of the transformer and of the VAE's decoder.

Regional by default: the double and the single block are compiled once and used for all of them, so that compile time
doesn't grow with depth. Inductor's flags are passed per compilation and set nothing in the process.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

from recipes.recipe import Recipe

# Shapes that one function is compiled for. Dynamo's own 8 are meant to catch functions that change at every call, and
# with fullgraph=True the ninth is an error; 256 is its limit for all the compilations of one function.
SHAPES = 256

# mode="max-autotune" of torch.compile, written out because a call takes a mode or options, without its CUDA graphs and
# without coordinate descent, which is a flag by itself (recipe.InductorFlags): on an H100 it took 109 of dev's 187 s of
# compiling and gave the steps nothing.
MAX_AUTOTUNE = {
    "max_autotune": True,
    "autotune_num_choices_displayed": 0,  # no tables of candidates on stderr
}


# Round where eager rounds. In bfloat16 timestep * 1000 is good to 4, and a kernel that keeps it in float32 gives the
# timestep embedding another argument than eager's: seen to turn one image into another. Regional compilation leaves the
# embeddings eager, and needs none of it, but for T5's first layer.
ROUND_AS_EAGER = {"emulate_precision_casts": True}

# On a GPU the search is over ATen's kernels (cuBLASLt, cuDNN) and those of Triton's GEMM templates that come near them:
# at FLUX.1's sizes cuBLASLt won or was within a few percent, and trying all of Triton's took 46 to 100 s a shape. Of
# Triton's convolutions torch 2.13's own configuration notes that they gain nothing on an H100. ATen's candidates have
# no description; small tiles are no match for large ones, and a GEMM too small for these is left to ATen.
FEW_CANDIDATES = {
    "max_autotune_gemm_backends": "ATEN,TRITON",
    "max_autotune_conv_backends": "ATEN",
    "test_configs.autotune_choice_desc_regex": (
        r"^$|^(?=.*BLOCK_M=(128|256)\b)(?=.*BLOCK_N=(128|256)\b)(?=.*BLOCK_K=(64|128)\b)"
    ),
}


def inductor_options(recipe: Recipe, device: torch.device) -> dict[str, Any]:
    """Inductor's configuration entries for one compilation on `device`."""
    regional = recipe.execution == "compile" and recipe.compile_scope == "regional"
    return {
        **({} if regional else ROUND_AS_EAGER),
        **(MAX_AUTOTUNE if recipe.max_autotune else {}),
        **(FEW_CANDIDATES if recipe.max_autotune and device.type == "cuda" else {}),
        **recipe.inductor_flags.options(),
    }


def apply(pipe: DiffusionPipeline, recipe: Recipe) -> str:
    # One compilation a shape: dynamic shapes cost speed, and a benchmark or a service has few shapes.
    options: dict[str, Any] = {"fullgraph": True, "dynamic": False, "options": inductor_options(recipe, pipe.device)}
    transformer = pipe.transformer
    if recipe.compile_scope == "regional":
        for block in (*transformer.transformer_blocks, *transformer.single_transformer_blocks):
            block.forward = torch.compile(block.forward, **options)
        # Around all blocks at once: setting the limit takes the host 24 microseconds, and each block would pay them.
        transformer.forward = with_many_shapes(transformer.forward)
        transformer.single_transformer_blocks[0].register_forward_pre_hook(_as_later_blocks_get_them, with_kwargs=True)
    else:
        compile_forward(transformer, options)
    if getattr(pipe, "vae", None) is None:
        return f"torch.compile, {recipe.compile_scope}"
    compile_forward(pipe.vae.decoder, options)
    return f"torch.compile, {recipe.compile_scope}, and the VAE's decoder"


def compile_forward(module: nn.Module, options: dict[str, Any]) -> None:
    """Compile a module's forward, and not its hooks, which may swap its arguments or start a CUDA graph's replay."""
    module.forward = with_many_shapes(torch.compile(module.forward, **options))


def with_many_shapes(function: Callable) -> Callable:
    """`function`, during whose calls what is compiled may be compiled for `SHAPES` shapes."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with torch._dynamo.config.patch(recompile_limit=SHAPES):
            return function(*args, **kwargs)

    return call


def _as_later_blocks_get_them(block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Text and image stream as two views of one tensor, as a single block gives them to the next one.

    The first single block gets them from the double blocks as two tensors, and other strides are another compilation.
    """
    text, image = kwargs["encoder_hidden_states"], kwargs["hidden_states"]
    both = torch.cat([text, image], dim=1)
    text, image = both.split([text.shape[1], image.shape[1]], dim=1)
    return args, {**kwargs, "encoder_hidden_states": text, "hidden_states": image}
