"""torch.compile of the text encoders, CLIP and T5, whole graphs only.

Their prompts come padded to one length, so that each is compiled once. Under execution=aoti, too, they are compiled at
the first call: packages hold the transformer and the VAE's decoder.
"""

from __future__ import annotations

from diffusers import DiffusionPipeline

from recipes.compile import ROUND_AS_EAGER, compile_forward, inductor_options
from recipes.optimization import Needs, Optimization
from recipes.recipe import Recipe


def _apply(pipe: DiffusionPipeline, recipe: Recipe) -> str:
    inductor = {**ROUND_AS_EAGER, **inductor_options(recipe, pipe.device)}  # whole graphs, embeddings included
    options = {"fullgraph": True, "dynamic": False, "options": inductor}
    for encoder in (pipe.text_encoder, pipe.text_encoder_2):
        compile_forward(encoder, options)
    return "torch.compile of CLIP and T5"


OPTIMIZATION = Optimization(
    field="compiled_text_encoders",
    needs=lambda recipe: Needs(compiler=True),
    lossless=lambda recipe: True,
    apply=_apply,
    components=("text_encoder", "text_encoder_2"),
    replaces_forward=lambda recipe: True,
)
