"""Packages in words, for `list` and `inspect`."""

from __future__ import annotations

from collections import Counter

from export import sizes
from export.manifest import Manifest, Model
from export.regions import AFTER, DECODER, WHOLE, Region
from export.store import Entry
from export.text_encoders import CLIP_LAYER, COMPONENTS, T5_FIRST_LAYER, T5_LAYER, TEXT_REGIONS
from recipes.ladder import command_line_name
from recipes.recipe import Recipe, RecipeError
from utils.request import MULTIPLE

_OF_LATENT = MULTIPLE // 2  # pixels a side


def line(entry: Entry) -> str:
    """A package in one line."""
    manifest = entry.manifest
    kinds = Counter(model.region for model in manifest.models.values())
    models = ", ".join(name if count == 1 else f"{count} {name}" for name, count in kinds.items())
    built = f"{entry.beside.size / 1e6:.2f} MB, {manifest.built.seconds:.0f} s to build"
    here = f"{manifest.identity.device} {manifest.identity.arch}"
    return f"{entry.path}: {_drawn(manifest)}{_encoded(manifest)}{built}, {here}, {recipe_name(entry)}: {models}"


def _encoded(manifest: Manifest) -> str:
    """The numbers of text tokens that it has T5's layers for, or else CLIP's."""
    lengths = _tokens(manifest, T5_FIRST_LAYER, T5_LAYER) or _tokens(manifest, CLIP_LAYER)
    return f"encodes {', '.join(map(str, lengths))} text tokens; " if lengths else ""


def _tokens(manifest: Manifest, *regions: Region) -> list[int]:
    """The numbers of tokens that it has models of these regions for."""
    names = [region.name for region in regions]
    inputs = [model.inputs for model in manifest.models.values() if model.region in names]
    hidden_states = [spec for each in inputs for name, spec in each.items() if name == "hidden_states"]
    return sorted({tokens for spec in hidden_states for tokens in spec.shape[1:2]})


def _drawn(manifest: Manifest) -> str:
    """The images' sizes in pixels, as its decoders have them, or without decoders their numbers of tokens."""
    decoders = [model for model in manifest.models.values() if model.region == DECODER.name]
    latents = [spec.shape[-2:] for model in decoders if not model.ranges for spec in model.inputs.values()]
    texts = ["x".join(str(side * _OF_LATENT) for side in sides) for sides in latents]
    texts += [sizes.words(name, one) for model in decoders for name, one in model.ranges.items()]
    if not texts:
        texts = [f"{tokens} image tokens" for tokens in _tokens(manifest, AFTER, WHOLE)]
    return f"draws {', '.join(texts)}; " if texts else ""


def description(entry: Entry) -> str:
    """All that a package's manifest says but the weights' names, in lines."""
    manifest, identity, built = entry.manifest, entry.manifest.identity, entry.manifest.built
    versions = ("torch", "cuda", "triton", "diffusers", "transformers", "torchao", "cudnn_frontend", "flash_attention")
    lines = [
        f"{entry.path}",
        f"  {entry.beside.size} bytes, sha256 {entry.beside.sha256}",
        f"  built by `{built.command}` from {built.checkpoint} in {built.seconds} s, {built.date}",
        f"  recipe {recipe_name(entry)}, dtype {identity.dtype}",
        f"  for {identity.device} {identity.arch}; "
        + ", ".join(f"{name} {getattr(identity, name)}" for name in versions if getattr(identity, name)),
        f"  sources {identity.sources[:12]}",
    ]
    of_text = {model.region for model in manifest.models.values()} <= {region.name for region in TEXT_REGIONS}
    for part, fields in identity.architecture.items():
        if (part in COMPONENTS) != of_text:
            continue
        lines.append(f"  {part}: " + ", ".join(f"{name}={value}" for name, value in fields.items()))
    for name, model in manifest.models.items():
        of_ranges = "".join(f", {sizes.words(size, one)}" for size, one in model.ranges.items())
        lines.append(f"  {name}: {_weights(model)}{of_ranges}")
        lines += [f"    {input_name}: {spec}" for input_name, spec in model.inputs.items()]
    return "\n".join(lines)


def recipe_name(entry: Entry) -> str:
    """The recipe's name on the command line, or why it has none here."""
    try:
        return command_line_name(Recipe.from_dict(entry.manifest.identity.recipe))
    except RecipeError as error:
        return f"a recipe of another version of this program ({error})"


def _weights(model: Model) -> str:
    if model.weights_sha256 is not None:
        return f"{len(model.weights)} weights inside, sha256 {model.weights_sha256[:12]}"
    return f"{len(model.bound)} of {len(model.weights)} weights bound when loaded"
