"""Checkpoints by one string: a hub id, a folder in diffusers format, `tiny`, or `random/flux-...`.

One table holds what each is called with by default; `load` turns the string into a pipeline.
"""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, FluxKontextPipeline, FluxPipeline
from diffusers.utils import logging as diffusers_logging
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError
from transformers.utils import logging as transformers_logging

from utils import random_weights
from utils.errors import UsageError, UserError, one_line
from utils.files import ROOT

TINY_FOLDER = ROOT / "assets" / "tiny-flux"


@dataclass(frozen=True)
class Defaults:
    """What a checkpoint is called with unless told otherwise, and the rung its results are compared with.

    guidance is the distilled guidance of FLUX.1-dev, ignored by a transformer without a guidance embedding.
    """

    steps: int
    guidance: float
    max_sequence_length: int
    height: int
    width: int
    baseline: str = "bf16"
    takes_image: bool = False
    prompt: str = "A cat playing with a ball of yarn"


SCHNELL = Defaults(steps=4, guidance=0.0, max_sequence_length=256, height=1024, width=1024, baseline="fp32")
DEV = Defaults(steps=28, guidance=3.5, max_sequence_length=512, height=1024, width=1024)
KONTEXT = Defaults(
    steps=28,
    guidance=2.5,
    max_sequence_length=512,
    height=1024,
    width=1024,
    takes_image=True,
    prompt="Put a party hat on the cat",
)
TINY = Defaults(
    steps=28,
    guidance=0.0,
    max_sequence_length=64,
    height=256,
    width=256,
    baseline="fp32",
    prompt="a red circle left of a blue square",
)
CHECKPOINTS: dict[str, Defaults] = {
    "tiny": TINY,
    "black-forest-labs/FLUX.1-schnell": SCHNELL,
    "black-forest-labs/FLUX.1-dev": DEV,
    "black-forest-labs/FLUX.1-Kontext-dev": KONTEXT,
    "random/flux-schnell": SCHNELL,
    "random/flux-dev": DEV,
    "random/flux-kontext-dev": KONTEXT,
}
_RANDOM_SEED = 0


def defaults(checkpoint: str) -> Defaults:
    """The defaults of a known checkpoint, or of a local folder by what its configuration says.

    Raises:
        UsageError: it is neither, or the folder isn't a Flux pipeline in diffusers format.
    """
    if checkpoint in CHECKPOINTS:
        return CHECKPOINTS[checkpoint]
    folder = Path(checkpoint)
    if not folder.exists():
        close = difflib.get_close_matches(checkpoint, CHECKPOINTS, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise UsageError(f"unknown checkpoint {checkpoint!r}: {hint}There are {', '.join(CHECKPOINTS)}, or a folder")
    pipeline = _read_json(folder, "model_index.json").get("_class_name")
    if pipeline not in ("FluxPipeline", "FluxKontextPipeline"):
        raise UsageError(f"{folder} holds a {pipeline}, not a FluxPipeline or FluxKontextPipeline")
    if _is_copy_of_tiny(folder):
        base = TINY
    else:
        base = DEV if _read_json(folder, "transformer/config.json").get("guidance_embeds") else SCHNELL
    if pipeline == "FluxKontextPipeline":
        return Defaults(**{**vars(base), "takes_image": True})
    return base


def load(checkpoint: str, dtype: torch.dtype, device: torch.device, progress: bool = True) -> DiffusionPipeline:
    """The pipeline with its weights as `dtype` on `device`; `progress` shows bars while loading.

    Raises:
        UsageError: unknown checkpoint, or a gated one without a token.
        UserError: weights missing or damaged.
    """
    known = defaults(checkpoint)
    kind = FluxKontextPipeline if known.takes_image else FluxPipeline
    transformers_logging.disable_progress_bar()  # it would break up diffusers' bar
    diffusers_logging.enable_progress_bar() if progress else diffusers_logging.disable_progress_bar()
    if checkpoint.startswith("random/"):
        return random_weights.build(kind, known.guidance > 0, dtype, device, _RANDOM_SEED, TINY_FOLDER)
    source = str(TINY_FOLDER) if checkpoint == "tiny" else checkpoint
    try:
        pipe = kind.from_pretrained(source, torch_dtype=dtype)
    except GatedRepoError:
        raise UsageError(
            f"{checkpoint} is gated: accept its licence on its Hugging Face page, then `hf auth login` or set HF_TOKEN"
        ) from None
    except (RepositoryNotFoundError, LocalEntryNotFoundError, HfHubHTTPError, ConnectionError) as error:
        raise UserError(f"could not download {checkpoint}: {one_line(error)}") from error
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"could not load {checkpoint}: {one_line(error)}; are its files whole?") from error
    pipe.set_progress_bar_config(disable=not progress, desc="denoising")
    return pipe.to(device)


def _read_json(folder: Path, name: str) -> dict:
    try:
        return json.loads((folder / name).read_text())
    except (OSError, ValueError):
        raise UsageError(f"{folder} isn't a diffusers pipeline: {name} is missing or damaged") from None


def _is_copy_of_tiny(folder: Path) -> bool:
    name = "transformer/config.json"
    return TINY_FOLDER.exists() and _read_json(folder, name) == _read_json(TINY_FOLDER, name)
