"""The transformer's call and the VAE's decoder as CUDA graphs: a denoising step is one launch.

One capture holds all blocks and what surrounds them, however they run: eagerly, compiled or from packages. What is
hoisted stays outside, and goes in as an argument. With loop_graph, the transformer's call is all steps, and so is the
graph.
"""

from __future__ import annotations

from diffusers import DiffusionPipeline

from recipes.optimization import Needs, Optimization
from recipes.recipe import Recipe
from utils.cuda_graph import LIMIT, Graphed, Graphs


def _apply(pipe: DiffusionPipeline, recipe: Recipe) -> str:
    graphs = Graphs(LIMIT)
    for module in (pipe.transformer, pipe.vae.decoder):
        forward = module.forward
        module.forward = Graphed(forward, graphs, getattr(forward, "warm_up", None))
    return f"transformer and VAE decoder, at most {LIMIT} graphs in one memory pool"


OPTIMIZATION = Optimization(
    field="cuda_graph", needs=lambda recipe: Needs(device="cuda"), lossless=lambda recipe: True, apply=_apply
)
