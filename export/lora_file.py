"""A LoRA's file: found, read, converted to the names of diffusers' layers, and checked.

What can't be put into effect is refused, where `pipe.load_lora_weights` leaves it out with a warning or without.

Source: FluxLoraLoaderMixin.lora_state_dict of diffusers (kohya's, XLabs' and other formats), `_create_lora_config`
there and LoraLayer of peft (the scale).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxPipeline
from diffusers.utils import convert_unet_state_dict_to_peft
from huggingface_hub import HfApi, hf_hub_download
from safetensors import SafetensorError, safe_open

from utils.errors import UsageError, UserError, one_line
from utils.quiet import quiet

_USUAL_NAME = "pytorch_lora_weights.safetensors"
_METADATA = "lora_adapter_metadata"  # peft's configuration, where diffusers wrote the file
_PREFIX = "transformer."
_FACTOR = re.compile(r"lora\d?[._](A|B|down|up)\.weight$|\.alpha$")
_OF_TEXT_ENCODER = re.compile(r"^(text_encoder|lora_te|text_model)")


@dataclass(frozen=True)
class Factors:
    """One layer's LoRA: its weight changes by scale * up @ down.

    down [rank, in features], up [out features, rank], on the CPU, with the dtype of the file.
    """

    down: torch.Tensor
    up: torch.Tensor
    scale: float

    @property
    def shape(self) -> list[int]:
        """[out features, in features]."""
        return [self.up.shape[0], self.down.shape[1]]

    def added_to(self, weight: torch.Tensor, scale: float) -> torch.Tensor:
        """weight + scale * self.scale * up @ down, computed in float32, in weight's dtype and on its device."""
        up, down = (x.to(weight.device, torch.float32) for x in (self.up, self.down))
        return torch.addmm(weight.float(), up, down, alpha=scale * self.scale).to(weight.dtype)


@dataclass(frozen=True)
class LoRA:
    """A LoRA of a Flux transformer: its source as it was asked for, and the factors by the layers' names."""

    source: str
    layers: dict[str, Factors]


def read(source: str | Path) -> LoRA:
    """The LoRA of a safetensors file, a folder or hub repository with one, or owner/name/file of a hub repository.

    Raises:
        UsageError: there is no such file, it is damaged or no LoRA, or holds what isn't supported: a text encoder's
            LoRA, DoRA, biases, ...
        UserError: it could not be downloaded.
    """
    path = _find(str(source))
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
            config = json.loads((file.metadata() or {}).get(_METADATA, "{}"))
    except (OSError, ValueError, SafetensorError) as error:
        raise UsageError(f"{path} is no whole safetensors file: {one_line(error)}") from None
    for name in tensors:
        _check_name(path, name)
    layers = _layers(path, *_converted(path, tensors), {n.removeprefix(_PREFIX): v for n, v in config.items()})
    return LoRA(str(source), layers)


def _find(source: str) -> Path:
    path = Path(source)
    if path.is_file():
        return path
    if path.is_dir():
        return path / _only(source, (p.name for p in path.iterdir()))
    parts = source.split("/")
    if len(parts) < 2 or parts[0] in ("", ".", "..", "~") or (len(parts) == 2 and source.endswith(".safetensors")):
        raise UsageError(f"the LoRA {source} is no file or folder, and no hub id")
    repository, name = "/".join(parts[:2]), "/".join(parts[2:])
    try:
        with quiet():
            return Path(hf_hub_download(repository, name or _only(source, HfApi().list_repo_files(repository))))
    except UsageError:
        raise
    except Exception as error:  # of the Hub's client, or of the HTTP library below it
        raise UserError(
            f"the LoRA {source} is no file or folder, and could not be downloaded: {one_line(error)}"
        ) from None


def _only(source: str, names: Iterable[str]) -> str:
    found = sorted(name for name in names if name.endswith(".safetensors"))
    if _USUAL_NAME in found:
        return _USUAL_NAME
    if len(found) != 1:
        listed = f": {', '.join(found)}; name one, as in {source}/{found[0]}" if found else ""
        raise UsageError(f"the LoRA {source} has {len(found) or 'no'} safetensors files{listed}")
    return found[0]


def _check_name(path: Path, name: str) -> None:
    if _OF_TEXT_ENCODER.match(name):
        raise UsageError(f"{path} changes a text encoder ({name}): only the transformer's LoRA is supported")
    if "dora" in name or "magnitude" in name:
        raise UsageError(f"{path} is a DoRA ({name}): only plain LoRA is supported")
    if not _FACTOR.search(name):
        raise UsageError(f"{path} holds {name}, which is no factor of a LoRA")


def _converted(path: Path, tensors: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """lora_A and lora_B, and the alphas that aren't in them yet, by the names of diffusers' layers."""
    try:
        with quiet():
            converted, alphas = FluxPipeline.lora_state_dict(tensors, return_alphas=True)
            if any(".lora.down." in name for name in converted):
                converted = convert_unet_state_dict_to_peft(converted)
    except (ValueError, NotImplementedError, AssertionError, LookupError, RuntimeError, AttributeError) as error:
        raise UsageError(f"{path} is in no LoRA format of FLUX.1 that diffusers knows: {one_line(error)}") from None
    return converted, {name.removesuffix(".alpha"): float(alpha) for name, alpha in (alphas or {}).items()}


def _layers(
    path: Path, tensors: dict[str, torch.Tensor], alphas: dict[str, float], config: dict[str, Any]
) -> dict[str, Factors]:
    pairs: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        layer, _, factor = name.removesuffix(".weight").rpartition(".")
        if factor not in ("lora_A", "lora_B") or not layer.startswith(_PREFIX):
            raise UsageError(f"{path} holds {name}, which fits no layer of FLUX.1's transformer")
        pairs.setdefault(layer, {})[factor] = tensor
    if not pairs:
        raise UsageError(f"{path} holds no LoRA")
    if alphas and set(alphas) != set(pairs):
        raise UsageError(f"{path} has an alpha for some layers only: not for {min(set(alphas) ^ set(pairs))}")
    layers = {}
    for layer, pair in pairs.items():
        if len(pair) < 2:
            raise UsageError(f"{path} has only {next(iter(pair))} for {layer}: lora_A and lora_B belong together")
        down, up = pair["lora_A"], pair["lora_B"]
        if down.ndim != 2 or up.ndim != 2 or down.shape[0] != up.shape[1]:
            raise UsageError(
                f"{path}: the ranks of {layer} differ: lora_A is {list(down.shape)}, lora_B {list(up.shape)}"
            )
        if not (down.isfinite().all() and up.isfinite().all()):
            raise UsageError(f"{path}: {layer} has values that aren't finite")
        name, rank = layer.removeprefix(_PREFIX), len(down)
        scale = _configured_scale(path, config, name, rank) if config else alphas.get(layer, rank) / rank
        layers[name] = Factors(down, up, scale)
    return layers


def _configured_scale(path: Path, config: dict[str, Any], layer: str, rank: int) -> float:
    """alpha / rank, or over the root of the rank (rsLoRA), as peft's configuration has them for a layer."""

    def configured(patterns: dict[str, float], default: float) -> float:
        return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", layer)), default)

    try:
        said = configured(config.get("rank_pattern") or {}, config["r"])
        alpha = float(configured(config.get("alpha_pattern") or {}, config["lora_alpha"]))
    except (KeyError, TypeError, ValueError, AttributeError, re.error) as error:
        raise UsageError(f"{path}: its configuration ({_METADATA}) is damaged: {one_line(error)}") from None
    if said != rank:
        raise UsageError(f"{path}: the rank of {layer} is {rank}, and {said} by the file's configuration")
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
