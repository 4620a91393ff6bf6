"""What benchmark.lora makes for itself: a LoRA of random values, and the files of a checkpoint that has none."""

from __future__ import annotations

import math
import re
import shutil
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, FluxPipeline
from torch import nn

from utils import checkpoints
from utils.errors import UserError

SEED = 0
CHANGE = 0.02  # the norm of what the LoRA adds to a weight, over the weight's
_IN_A_BLOCK = re.compile(r"(single_)?transformer_blocks\.\d+\.(attn|ff|ff_context|proj_mlp|proj_out)(\..+)?")
_BESIDE = 10**9  # bytes: a LoRA of rank 64 has 300 MB, a recipe's packages some MB


def linears(transformer: nn.Module) -> dict[str, nn.Linear]:
    """The attention and feed-forward Linears of all blocks: 418 of FLUX.1's, before a recipe renames them."""
    return {n: m for n, m in transformer.named_modules() if isinstance(m, nn.Linear) and _IN_A_BLOCK.fullmatch(n)}


def write_lora(transformer: nn.Module, rank: int, folder: Path) -> Path:
    """The file of a LoRA over `linears(transformer)`, in diffusers' format and bfloat16, of seeded normal values.

    They are scaled so that ||up @ down|| is about CHANGE * ||weight||: E ||up @ down||^2 of standard normal factors is
    rank * out features * in features.
    """
    random = torch.Generator().manual_seed(SEED)
    factors: dict[str, torch.Tensor] = {}
    for name, linear in linears(transformer).items():
        norm = float(linear.weight.detach().float().norm())
        down = torch.randn(rank, linear.in_features, generator=random) / math.sqrt(linear.in_features)
        up = torch.randn(linear.out_features, rank, generator=random) / math.sqrt(rank * linear.out_features)
        factors |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": CHANGE * norm * up}
    folder.mkdir()
    FluxPipeline.save_lora_weights(
        folder, transformer_lora_layers={name: factor.bfloat16() for name, factor in factors.items()}
    )
    (file,) = folder.iterdir()
    return file


def check_disk(checkpoint: str, dtype: torch.dtype, folder: Path) -> None:
    """Raise UserError unless what `write_checkpoint` would write fits below `folder`; no weight is made for that."""
    transformer = checkpoints.load(checkpoint, dtype, torch.device("meta"), progress=False).transformer
    needed, free = sum(p.nbytes for p in transformer.parameters()) + _BESIDE, shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"{checkpoint} has no files, and {folder} has no room for them: {needed / 1e9:.1f} GB are needed and "
            f"{free / 1e9:.1f} GB free; name a folder on a larger disk with --scratch"
        )


def write_checkpoint(pipe: DiffusionPipeline, folder: Path) -> None:
    """What a LoRA on `pipe` is computed from, into `folder`: the transformer and the pipeline's index."""
    pipe.save_config(folder)
    pipe.transformer.save_pretrained(folder / "transformer")
