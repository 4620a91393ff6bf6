"""Time one double and one single block of FLUX.1 at full size, compiled: `python -m benchmark.blocks --output FILE`.

1024x1024, one image, random weights; by quantization, attention and kernels. 19 double and 38 single blocks are
nearly all of a denoising step. The error is against the first variant that ran, bfloat16 unless that failed.
"""

from __future__ import annotations

import time
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
    from benchmark.device_timing import graph_ms
    from recipes import attention, float8, fused_kernels, fused_qkv, gemm_epilogues
    from recipes.apply import refusal
    from recipes.recipe import Recipe
    from utils.random_weights import creating
    from utils.relative_error import relative_error

TEXT, SIDE, DIM = 512, 64, 3072
DOUBLE_BLOCKS, SINGLE_BLOCKS = 19, 38


def recipes() -> list[Recipe]:
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
    return [*bfloat16, *float8_per_row, replace(float8_per_row[-1], gemm_epilogues=True)]


class _Vae(nn.Module):
    """Stands for the VAE, which fusing the projections wants to fuse too."""

    def fuse_qkv_projections(self) -> None:
        """It has none."""


def transformer(recipe: Recipe, device: torch.device) -> FluxTransformer2DModel:
    """One block of each kind at full size, random weights, optimized as `recipe` says."""
    with creating(torch.bfloat16, device, seed=0):
        model = FluxTransformer2DModel(num_layers=1, num_single_layers=1, guidance_embeds=True)
    pipe: Any = SimpleNamespace(transformer=model.eval().requires_grad_(False), vae=_Vae(), device=device)
    for optimization in (attention, fused_qkv, float8, fused_kernels, gemm_epilogues):
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
def measure(recipe: Recipe, references: dict[str, torch.Tensor], device: torch.device) -> dict[str, Any]:
    torch._dynamo.reset()
    model = transformer(recipe, device)
    arguments = inputs(model, device)
    row: dict[str, Any] = {}
    for kind, block in (("double", model.transformer_blocks[0]), ("single", model.single_transformer_blocks[0])):
        forward = torch.compile(block.forward, fullgraph=True, dynamic=False)
        begun = time.monotonic()
        out = torch.cat(forward(**arguments), dim=1).float()
        reference = references.setdefault(kind, out)
        row[kind] = {
            "compile_s": time.monotonic() - begun,
            "ms": graph_ms([partial(forward, **arguments)] * 5),
            "relative_error": relative_error(out, reference),
        }
    row["all_blocks_ms"] = sum(
        count * row[kind]["ms"]["median"] for kind, count in (("double", DOUBLE_BLOCKS), ("single", SINGLE_BLOCKS))
    )
    return row


def line(row: dict[str, Any]) -> str:
    kernels = "epilogues" if row["gemm_epilogues"] else "fused" if row["fused_kernels"] else "unfused"
    text = f"{row['quantization']:<15}  {row['attention']:<10}  {kernels:<9}"
    if "double" in row:
        double, single = row["double"], row["single"]
        text += f"  {double['ms']['median']:9.3f}  {single['ms']['median']:9.3f}  {row['all_blocks_ms']:13.1f}"
        text += f"  {double['relative_error']:.4f} {single['relative_error']:.4f}"
        text += f"  {double['compile_s'] + single['compile_s']:9.1f}"
    return text


def measurements(device: torch.device) -> list[series.Measurement]:
    references: dict[str, Any] = {}
    return [
        series.Measurement(
            {name: getattr(recipe, name) for name in ("quantization", "attention", "fused_kernels", "gemm_epilogues")},
            partial(measure, recipe, references, device),
            refusal(recipe, device),
        )
        for recipe in recipes()
    ]


def main() -> None:
    header = "quantization     attention   kernels    double ms  single ms  all blocks ms  errors         compile s"
    series.main("blocks", __doc__, measurements, header, line)


if __name__ == "__main__":
    main()
