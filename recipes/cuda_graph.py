"""The transformer's call, the VAE's decoder and the text encoders as CUDA graphs: a step is one launch.

One capture holds all blocks and what surrounds them, however they run: eagerly, compiled or from packages. What is
hoisted has graphs of its own, and goes in as an argument: at a call's first step the GPU would wait for the host, which
launches some 170 kernels more. (Not so weights that are brought from the host for it.) Without `compiled_text_encoders`
the text encoders stay as they are. With loop_graph, the transformer's call is all steps, and so is the graph.
"""

from __future__ import annotations

from diffusers import DiffusionPipeline

from recipes import text_encoders
from recipes.hoisting import hoisted
from recipes.optimization import Needs, Optimization
from recipes.recipe import Recipe
from utils import cuda_bindings
from utils.changes import when_changed
from utils.cuda_graph import HOISTED_LIMIT, LIMIT, Graphed, Graphs


def _apply(pipe: DiffusionPipeline, recipe: Recipe) -> str:
    graphs = Graphs(LIMIT)
    captured = {"transformer": pipe.transformer}
    if getattr(pipe, "vae", None) is not None:
        captured["VAE decoder"] = pipe.vae.decoder
    if recipe.compiled_text_encoders:
        captured |= text_encoders.encoders(pipe)
    for module in captured.values():
        forward = module.forward
        module.forward = Graphed(forward, graphs, getattr(forward, "warm_up", None))
        when_changed(module, graphs.clear)
    before_loop = Graphs(HOISTED_LIMIT, graphs)
    for one in hoisted(pipe.transformer):
        one.function = Graphed(one.function, before_loop)
    memsets = "" if cuda_bindings.installed() else ", memsets among their kernels for want of the package cuda-bindings"
    names = [*captured, *(one.name for one in hoisted(pipe.transformer))]
    return f"{', '.join(names)}: at most {LIMIT + HOISTED_LIMIT} graphs in one memory pool{memsets}"


OPTIMIZATION = Optimization(
    field="cuda_graph",
    needs=lambda recipe: Needs(device="cuda"),
    lossless=lambda recipe: True,
    apply=_apply,
    merges_weights=lambda recipe: True,  # a LoRA's scale would be one of the graph's constants
    replaces_forward=lambda recipe: True,
)
