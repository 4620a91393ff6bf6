"""torch.compile, whole graphs only, of the transformer and of the VAE's decoder.

Regional by default: the double and the single block are compiled once and used for all of them, so that compile time
doesn't grow with depth (the double block twice: the first one's input has other strides than the others'). Inductor's
flags are passed per compilation and set nothing in the process.
"""

from __future__ import annotations

from typing import Any

from diffusers import DiffusionPipeline

from recipes.recipe import Recipe

# mode="max-autotune" of torch.compile without its CUDA graphs, written out because a call takes a mode or options.
MAX_AUTOTUNE = {
    "max_autotune": True,
    "coordinate_descent_tuning": True,
    "autotune_num_choices_displayed": 0,  # no tables of candidates on stderr
}


# Round where eager rounds. In bfloat16 timestep * 1000 is good to 4, and a kernel that keeps it in float32 gives the
# timestep embedding another argument than eager's: seen to turn one image into another. Regional compilation leaves the
# embeddings eager, and needs none of it.
ROUND_AS_EAGER = {"emulate_precision_casts": True}


def inductor_options(recipe: Recipe) -> dict[str, Any]:
    regional = recipe.execution == "compile" and recipe.compile_scope == "regional"
    return {
        **({} if regional else ROUND_AS_EAGER),
        **(MAX_AUTOTUNE if recipe.max_autotune else {}),
        **recipe.inductor_flags.options(),
    }


def apply(pipe: DiffusionPipeline, recipe: Recipe) -> str:
    # One compilation a shape: dynamic shapes cost speed, and a benchmark or a service has few shapes.
    options: dict[str, Any] = {"fullgraph": True, "dynamic": False, "options": inductor_options(recipe)}
    if recipe.compile_scope == "regional":
        pipe.transformer.compile_repeated_blocks(**options)
    else:
        pipe.transformer.compile(**options)
    pipe.vae.decoder.compile(**options)
    return f"torch.compile, {recipe.compile_scope}, and the VAE's decoder"
