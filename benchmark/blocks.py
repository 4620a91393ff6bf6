"""Time one double and one single block of FLUX.1 at full size, compiled: `python -m benchmark.blocks --output FILE`.

1024x1024, one image, random weights; by quantization, attention and kernels, or of the recipes that are named. 19
double and 38 single blocks are nearly all of a denoising step. All are timed in turns, each for so long that a GPU at
its power limit has come to the clock that it keeps with it. The error is against the first recipe that ran.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from utils.quiet import quiet

with quiet():
    from diffusers import FluxTransformer2DModel

    from benchmark import series
    from benchmark.device_timing import Captured, captured, sustained
    from recipes import attention, float8, fused_kernels, fused_qkv, gemm_epilogues, int8_adaln
    from recipes.apply import refusal
    from recipes.ladder import parse
    from recipes.recipe import Recipe
    from utils.errors import Parser, run_command
    from utils.random_weights import creating
    from utils.relative_error import relative_error

TEXT, SIDE, DIM = 512, 64, 3072
DOUBLE_BLOCKS, SINGLE_BLOCKS = 19, 38
_CALLS = 5  # in a graph
_VARIED = ("quantization", "attention", "fused_kernels", "gemm_epilogues", "int8_adaln")
HEADER = "quantization     attention   kernels    double ms  single ms  all blocks ms  errors         compile s  MHz"
Graphs = dict[str, Captured]


def compared() -> list[Recipe]:
    """What is compared, the plainest first."""
    bfloat16 = [
        Recipe(dtype="bfloat16", fused_qkv=True, attention="cudnn", fused_kernels=fused) for fused in (False, True)
    ]
    variants: list[tuple[Any, bool]] = [
        *(("cudnn", False), ("cudnn", True)),
        *((float8, True) for float8 in ("triton_fp8", "cudnn_fp8", "wgmma_fp8")),
    ]
    float8_per_row = [
        Recipe(dtype="bfloat16", fused_qkv=True, quantization="float8_per_row", attention=attend, fused_kernels=fused)
        for attend, fused in variants
    ]
    epilogues = replace(float8_per_row[-1], gemm_epilogues=True)
    return [*bfloat16, *float8_per_row, epilogues, replace(epilogues, int8_adaln=True)]


class _Vae(nn.Module):
    """Stands for the VAE, which fusing the projections wants to fuse too."""

    def fuse_qkv_projections(self) -> None:
        """It has none."""


def transformer(recipe: Recipe, device: torch.device) -> FluxTransformer2DModel:
    """One block of each kind at full size, random weights, optimized as `recipe` says."""
    with creating(torch.bfloat16, device, seed=0):
        model = FluxTransformer2DModel(num_layers=1, num_single_layers=1, guidance_embeds=True)
    pipe: Any = SimpleNamespace(transformer=model.eval().requires_grad_(False), vae=_Vae(), device=device)
    for optimization in (attention, fused_qkv, float8, fused_kernels, gemm_epilogues, int8_adaln):
        if optimization.OPTIMIZATION.requested(recipe):
            optimization.OPTIMIZATION.apply(pipe, recipe)
    return model


def inputs(model: FluxTransformer2DModel, device: torch.device) -> dict[str, Any]:
    """A block's arguments; text and image are views of one tensor, as a single block gets them."""
    random = torch.Generator(device).manual_seed(1)
    tokens = TEXT + SIDE * SIDE
    joint, temb = (torch.randn(1, n, DIM, device=device, generator=random).bfloat16() for n in (tokens, 1))
    text, image = joint.split([TEXT, SIDE * SIDE], dim=1)
    ids = torch.zeros(tokens, 3, device=device)
    place = torch.arange(SIDE * SIDE, device=device)
    ids[TEXT:, 1], ids[TEXT:, 2] = place // SIDE, place % SIDE
    rotary = model.pos_embed(ids)
    return {"hidden_states": image, "encoder_hidden_states": text, "temb": temb[:, 0], "image_rotary_emb": rotary}


@torch.no_grad()
def prepare(recipe: Recipe, references: dict[str, torch.Tensor], device: torch.device) -> tuple[dict[str, Any], Graphs]:
    """One recipe's figures but for its times, and graphs of `_CALLS` calls of its blocks."""
    torch._dynamo.reset()
    model = transformer(recipe, device)
    arguments = inputs(model, device)
    row: dict[str, Any] = {}
    graphs: Graphs = {}
    for kind, block in (("double", model.transformer_blocks[0]), ("single", model.single_transformer_blocks[0])):
        forward = torch.compile(block.forward, fullgraph=True, dynamic=False)
        begun = time.monotonic()
        out = torch.cat(forward(**arguments), dim=1).float()
        reference = references.setdefault(kind, out)
        row[kind] = {"compile_s": time.monotonic() - begun, "relative_error": relative_error(out, reference)}
        graphs[kind] = captured([partial(forward, **arguments)] * _CALLS)
    return row, graphs


class Turns:
    """The blocks of all recipes that can run, timed in turns once the first one's figures are asked for."""

    def __init__(self, recipes: Sequence[Recipe], device: torch.device):
        self.recipes, self.device = recipes, device
        self._found: dict[Recipe, dict[str, Any] | Exception] = {}

    def figures(self, recipe: Recipe) -> dict[str, Any]:
        if not self._found:
            self._measure()
        found = self._found[recipe]
        if isinstance(found, Exception):
            raise found
        return found

    def _measure(self) -> None:
        references: dict[str, torch.Tensor] = {}
        rows: dict[Recipe, dict[str, Any]] = {}
        graphs: dict[tuple[Recipe, str], Captured] = {}
        for recipe in self.recipes:
            try:
                rows[recipe], of_recipe = prepare(recipe, references, self.device)
            except Exception as error:  # the others are worth their measurement
                self._found[recipe] = error
                continue
            graphs |= {(recipe, kind): graph for kind, graph in of_recipe.items()}
        for (recipe, kind), figures in sustained(graphs, _CALLS, self.device).items():
            rows[recipe][kind] |= figures
        for recipe, row in rows.items():
            blocks = ((DOUBLE_BLOCKS, "double"), (SINGLE_BLOCKS, "single"))
            self._found[recipe] = {
                **row,
                "all_blocks_ms": sum(count * row[kind]["ms"]["median"] for count, kind in blocks),
            }


def line(row: dict[str, Any]) -> str:
    kernels = "epilogues" if row["gemm_epilogues"] else "fused" if row["fused_kernels"] else "unfused"
    kernels = "int8" if row["int8_adaln"] else kernels
    text = f"{row['quantization']:<15}  {row['attention']:<10}  {kernels:<9}"
    if "double" in row:
        double, single = row["double"], row["single"]
        text += f"  {double['ms']['median']:9.3f}  {single['ms']['median']:9.3f}  {row['all_blocks_ms']:13.1f}"
        text += f"  {double['relative_error']:.4f} {single['relative_error']:.4f}"
        text += f"  {double['compile_s'] + single['compile_s']:9.1f}"
        text += f"  {double['sm_clock_mhz'] or 0:4.0f} {single['sm_clock_mhz'] or 0:4.0f}"
    return text


def measurements(recipes: Sequence[Recipe], device: torch.device) -> list[series.Measurement]:
    skipped = {recipe: refusal(recipe, device) for recipe in recipes}
    turns = Turns([recipe for recipe in recipes if skipped[recipe] is None], device)
    return [
        series.Measurement(
            {name: getattr(recipe, name) for name in _VARIED},
            partial(turns.figures, recipe),
            skipped[recipe],
        )
        for recipe in recipes
    ]


def parser() -> Parser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "recipes",
        nargs="*",
        metavar="RECIPE",
        help="as run_benchmark.py's --recipe (default: from the plainest to the fastest)",
    )
    series.add_options(parser)
    return parser


def main() -> None:
    arguments = parser().parse_args()

    def command() -> None:
        device = series.check(arguments)
        asked = [parse(text) for text in arguments.recipes] or compared()
        series.run("blocks", measurements(asked, device), HEADER, line, arguments, device)

    run_command(command, arguments.debug)


if __name__ == "__main__":
    main()
