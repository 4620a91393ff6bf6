"""Run a package's models against the modules that they stand in for, on random inputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.utils import _pytree as pytree

from export import regions, sizes
from export.manifest import Model
from export.regions import Inputs
from export.runtime import Library, PackagedRegion
from export.sizes import Specs
from export.store import Entry
from recipes.attention_backends import FLOAT8
from utils.relative_error import relative_error

# Largest relative error of a whole output, by dtype: what other roundings make of it. In float8, that of the Linears or
# of the attention, an activation that is rounded otherwise moves by up to an eighth.
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}
TOLERANCE_FLOAT8 = 1e-1


@dataclass(frozen=True)
class Error:
    """||package - eager|| / ||eager|| of one model, the largest over the modules that it was tried on."""

    model: str
    modules: int
    value: float
    tolerance: float

    @property
    def ok(self) -> bool:
        return self.value <= self.tolerance  # false of NaN, too

    def __str__(self) -> str:
        verdict = "ok" if self.ok else "WRONG"
        error = f"relative error {self.value:.2g} (at most {self.tolerance:g})"
        return f"{self.model}: {verdict}, {error}, {self.modules} module{'s' if self.modules > 1 else ''}"


@torch.no_grad()
def verify(entry: Entry, library: Library) -> list[Error]:
    """Every model of a package, on each module that it stands in for.

    Raises:
        UserError: the package doesn't fit the library's pipeline.
    """
    recipe = entry.manifest.identity.recipe
    in_float8 = recipe["quantization"] != "none" or recipe["attention"] in FLOAT8
    tolerance = TOLERANCE_FLOAT8 if in_float8 else TOLERANCE[entry.manifest.identity.dtype]
    errors = []
    for name, model in entry.manifest.models.items():
        # A float8 recipe leaves the VAE as it is.
        of_model = TOLERANCE[entry.manifest.identity.dtype] if model.region == regions.DECODER.name else tolerance
        standing_in = [region for region in library.packaged if region.region.name == model.region]
        device = library.pipe.transformer.device
        worst = max(
            (
                _error(library, entry, name, region, random_inputs(specs, device))
                for specs in tried(model)
                for region in standing_in
            ),
            key=_nan_first,
        )
        errors.append(Error(name, len(standing_in), worst, of_model))
    return errors


def tried(model: Model) -> list[Specs]:
    """What a model is tried on: its inputs; of one for a range the smallest, the next and the largest sizes.

    The next, because what the compiler may wrongly have taken for given is that a size is a multiple of something.
    """
    if not model.ranges:
        return [model.inputs]
    own, ends = sizes.of(model.inputs), model.ranges.items()
    return [
        sizes.at(model.inputs, {**own, **{name: one.smallest for name, one in ends}}),
        sizes.at(model.inputs, {**own, **{name: one.smallest + 1 for name, one in ends}}),
        sizes.at(model.inputs, {**own, **{name: one.largest for name, one in ends}}),
    ]


def random_inputs(specs: Specs, device: torch.device) -> Inputs:
    """Inputs of these kinds: position ids that count, times within 0..1, all else normal; seeded."""
    random = torch.Generator().manual_seed(0)
    flat: dict[str, torch.Tensor] = {}
    for name, spec in specs.items():
        dtype = getattr(torch, spec.dtype)
        if name.endswith("_ids"):
            values = torch.arange(spec.shape[0])[:, None].expand(spec.shape).remainder(64).float()
        elif name == "timestep":
            values = torch.rand(spec.shape, generator=random)
        else:
            values = torch.randn(spec.shape, generator=random)
        flat[name] = torch.empty_strided(spec.shape, spec.stride, dtype=dtype, device=device).copy_(values)
    inputs: Inputs = {}
    for name, tensor in flat.items():
        owner, dot, _ = name.partition(".")
        inputs[owner] = (*inputs.get(owner, ()), tensor) if dot else tensor
    return inputs


def _error(library: Library, entry: Entry, name: str, region: PackagedRegion, inputs: Inputs) -> float:
    with region.unpackaged() as module:
        expected = pytree.tree_leaves(module(**inputs))
    got = pytree.tree_leaves(library.bound(region, entry, name, inputs)(inputs))
    return max((relative_error(g, e) for g, e in zip(got, expected, strict=True)), key=_nan_first)


def _nan_first(value: float) -> float:
    return float("inf") if value != value else value
