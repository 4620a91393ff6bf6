"""Checkpoints by one string: a hub id, a folder in diffusers format, `tiny`, or `random/flux-...`.

One table holds what each is called with by default; `load` turns the string into a pipeline.
"""

from __future__ import annotations

import difflib
import json
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, FluxKontextPipeline, FluxPipeline, FluxTransformer2DModel
from diffusers.utils import logging as diffusers_logging
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id
from torch import nn
from tqdm import tqdm
from transformers import CLIPTextModel, T5EncoderModel
from transformers.utils import logging as transformers_logging

from utils import random_weights
from utils.device_memory import free_host_memory
from utils.errors import UsageError, UserError, advising, is_out_of_memory, one_line
from utils.files import ROOT, permitted
from utils.quiet import quiet

TINY_FOLDER = ROOT / "assets" / "tiny-flux"


@dataclass(frozen=True)
class Defaults:
    """What a checkpoint is called with unless told otherwise, and the rung its results are compared with.

    guidance is the distilled guidance of FLUX.1-dev, ignored by a transformer without a guidance embedding.
    vocabulary: what it can be asked for: anything, or the scenes of tiny_flux. one_size: it was trained at this height
    and width alone.
    """

    steps: int
    guidance: float
    max_sequence_length: int
    height: int
    width: int
    baseline: str = "bf16"
    takes_image: bool = False
    prompt: str = "A cat playing with a ball of yarn"
    vocabulary: Literal["any", "scenes"] = "any"
    one_size: bool = False


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
    prompt="a red triangle left of a blue square",
    vocabulary="scenes",
    one_size=True,
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
UNNAMED = "CHECKPOINT"  # stands for one that nothing is known of
_NAME = "_checkpoint"  # a pipeline's attribute
_RANDOM_SEED = 0
_PARTS: dict[str, Any] = {
    "transformer": FluxTransformer2DModel,
    "text_encoder_2": T5EncoderModel,
    "text_encoder": CLIPTextModel,
    "vae": AutoencoderKL,
}


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


def warn_of_other_size(checkpoint: str, height: int, width: int) -> None:
    """Say on stderr that the checkpoint was never shown images of this size."""
    known = defaults(checkpoint)
    if known.one_size and (height, width) != (known.height, known.width):
        trained = f"{known.height}x{known.width}"
        print(f"warning: {checkpoint} was trained at {trained} alone: another size draws worse", file=sys.stderr)


def is_random(checkpoint: str) -> bool:
    """Whether its weights are random: for timing, and what it draws is noise."""
    return checkpoint.startswith("random/")


def load(checkpoint: str, dtype: torch.dtype, device: torch.device, progress: bool = True) -> DiffusionPipeline:
    """The pipeline with its weights as `dtype` on `device`; `progress` shows bars while loading.

    Raises:
        UsageError: unknown checkpoint, or a gated one without a token.
        UserError: it could not be downloaded, weights are missing or damaged, or random ones exceed the host's memory.
        OutOfMemoryError: the weights don't fit.
    """
    known = defaults(checkpoint)
    kind = _kind(known)
    with advising("while loading", lambda: _saving_memory(dtype)):
        if is_random(checkpoint):
            made_on = partial(
                random_weights.build, kind, known.guidance > 0, dtype, seed=_RANDOM_SEED, tokenizers=TINY_FOLDER
            )
            if device.type == "cpu":
                _check_memory(checkpoint, made_on(device=torch.device("meta")))
            pipe = made_on(device=device)
        else:
            pipe = _from_pretrained(kind, checkpoint, dtype, progress).to(device)
    setattr(pipe, _NAME, checkpoint)
    pipe.set_progress_bar_config(disable=not progress, desc="denoising")
    return pipe


def name(pipe: DiffusionPipeline) -> str:
    """What a pipeline was loaded from, as `load` takes it.

    Of a pipeline that `load` didn't make: the hub id that diffusers knows, or else `UNNAMED`.
    """
    if (loaded := getattr(pipe, _NAME, None)) is not None:
        return str(loaded)
    source = str(pipe.config.get("_name_or_path") or UNNAMED)
    if Path(source) == TINY_FOLDER:
        return "tiny"
    return source if _is_hub_id(source) else UNNAMED


def public_name(checkpoint: str) -> str:
    """A checkpoint's name for others to read: of a folder its own, without those that it lies in."""
    path = Path(checkpoint)
    is_folder = checkpoint not in CHECKPOINTS and (path.is_absolute() or path.exists())
    return path.resolve().name if is_folder else checkpoint


def _check_memory(checkpoint: str, pipe: DiffusionPipeline) -> None:
    """Raise UserError unless weights like the pipeline's fit the host's memory: the system would end the process."""
    models = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
    needed = sum(weight.numel() * weight.itemsize for model in models for weight in model.parameters())
    if needed > (free := free_host_memory()):
        raise UserError(
            f"{checkpoint} takes {needed / 2**30:.0f} GiB of memory, and {free / 2**30:.0f} are free: "
            "use --checkpoint tiny, or a GPU"
        )


def _saving_memory(dtype: torch.dtype) -> str:
    """What helps where the weights don't fit: a recipe's other fields act on weights that were loaded."""
    if dtype == torch.float32:
        return "use a recipe with dtype=bfloat16"
    return "all weights are loaded before a recipe makes them smaller: use a device with more memory free"


def folder(checkpoint: str) -> Path:
    """The folder with a checkpoint's files in diffusers format, downloaded where they aren't in the cache.

    Raises:
        UsageError: unknown checkpoint, a gated one without a token, or random/..., which has no files.
        UserError: it could not be downloaded.
    """
    known = defaults(checkpoint)
    if is_random(checkpoint):
        raise UsageError(f"{checkpoint} has no files to read weights from: use a folder or a hub id")
    local = TINY_FOLDER if checkpoint == "tiny" else Path(checkpoint)
    return local if local.exists() else Path(_download(_kind(known), checkpoint))


def _is_hub_id(source: str) -> bool:
    """Whether it reads as owner/name, and is no folder here."""
    try:
        validate_repo_id(source)
    except HFValidationError:
        return False
    return "/" in source and not Path(source).exists()


def _kind(known: Defaults) -> type[DiffusionPipeline]:
    return FluxKontextPipeline if known.takes_image else FluxPipeline


def _download(kind: type[DiffusionPipeline], checkpoint: str) -> str:
    """The local folder of a hub id's files, downloaded where they aren't in the cache."""
    try:
        with quiet():
            return kind.download(checkpoint)
    except GatedRepoError:
        raise UsageError(
            f"{checkpoint} is gated: accept its licence on its Hugging Face page, then `hf auth login` or set HF_TOKEN"
        ) from None
    except (OSError, HfHubHTTPError) as error:
        cause = one_line(error.__cause__ or error).rstrip(".")
        raise UserError(f"{checkpoint} is not in the cache and could not be downloaded: {cause}") from error


def _from_pretrained(
    kind: type[DiffusionPipeline], checkpoint: str, dtype: torch.dtype, progress: bool
) -> DiffusionPipeline:
    """diffusers' own loading, part by part: only so does it tell of weights it didn't find and made up at random."""
    source = str(folder(checkpoint))
    for library in (diffusers_logging, transformers_logging):
        library.disable_progress_bar()  # theirs would break up ours
    parts: dict[str, torch.nn.Module] = {}
    try:
        with quiet():
            for name, part in tqdm(_PARTS.items(), desc="loading", unit=" models", disable=not progress):
                parts[name], report = part.from_pretrained(
                    source, subfolder=name, dtype=dtype, output_loading_info=True
                )
                missing = [*report["missing_keys"], *(n for n, p in parts[name].named_parameters() if p.is_meta)]
                if missing:
                    raise ValueError(f"{name} lacks {missing[0]}")
            return kind.from_pretrained(source, **parts)
    except Exception as error:  # damaged files end in whatever the library met first: KeyError, SafetensorError, ...
        if is_out_of_memory(error):
            raise
        raise UserError(f"could not load {checkpoint}: {one_line(error)}; are its files whole?") from error


def _read_json(folder: Path, name: str) -> dict:
    try:
        with permitted("read"):
            text = (folder / name).read_text()
        return dict(json.loads(text))
    except (OSError, ValueError, TypeError):
        raise UsageError(f"{folder} isn't a diffusers pipeline: {name} is missing or damaged") from None


def _is_copy_of_tiny(folder: Path) -> bool:
    name = "transformer/config.json"
    return TINY_FOLDER.exists() and _read_json(folder, name) == _read_json(TINY_FOLDER, name)
