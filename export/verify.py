"""Run a package's models against the modules that they stand in for, on random inputs."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from export import regions, sizes, text_encoders
from export.manifest import Model
from export.regions import Inputs
from export.sizes import Specs
from export.store import Entry
from recipes.attention_backends import FLOAT8
from recipes.gemm_epilogues import turns
from utils.errors import UserError
from utils.exact_convolutions import exact_convolutions
from utils.relative_error import relative_error

if TYPE_CHECKING:  # it verifies what it builds
    from export.runtime import Library, PackagedRegion

# Largest relative error of a whole output, by dtype: what other roundings make of it. In float8, that of the Linears or
# of the attention, an activation that is rounded otherwise moves by up to an eighth.
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}
TOLERANCE_FLOAT8 = 1e-1
# The roundings of the VAE decoder's many layers add up, and T5's attention, whose scores aren't scaled, magnifies them:
# of random numbers the embedded model's eager layer is 0.07 off. So where they amount to more than that, these are held
# to what is right: they may be so much farther from the module in float32 than the eager module is.
FARTHER_THAN_EAGER = {
    regions.DECODER.name: 1.1,
    text_encoders.T5_FIRST_LAYER.name: 2.0,
    text_encoders.T5_LAYER.name: 2.0,
}


@dataclass(frozen=True)
class Error:
    """||package - eager|| / ||eager|| of one model, the largest over the modules that it was tried on.

    over_eager: of one of FARTHER_THAN_EAGER above the tolerance, its error against the module in float32 over eager's,
    and farther: at most so.
    """

    model: str
    modules: int
    value: float
    tolerance: float
    over_eager: float | None = None
    farther: float = 0.0

    @property
    def ok(self) -> bool:
        if self.over_eager is not None:
            return self.over_eager <= self.farther
        return self.value <= self.tolerance  # false of NaN, too

    def __str__(self) -> str:
        verdict = "ok" if self.ok else "WRONG"
        error = f"relative error {self.value:.2g} (at most {self.tolerance:g})"
        if self.over_eager is not None:
            error += f", to float32 {self.over_eager:.2f} times eager's (at most {self.farther:g})"
        return f"{self.model}: {verdict}, {error}, {self.modules} module{'s' if self.modules > 1 else ''}"


@torch.no_grad()
@exact_convolutions()
def verify(entry: Entry, library: Library, among: Iterable[PackagedRegion] | None = None) -> list[Error]:
    """Every model of a package, on each module that it stands in for; `among`: on those of them that are given.

    Raises:
        UserError: the package doesn't fit the library's pipeline.
    """
    recipe = library.recipe
    in_float8 = {
        "transformer": recipe.quantization != "none" or recipe.attention in FLOAT8,
        text_encoders.T5_LAYER.component: recipe.float8_text_encoder,
    }
    dtype = entry.manifest.identity.dtype
    device = library.pipe.transformer.device
    regions_here = library.packaged if among is None else list(dict.fromkeys(among))
    errors = []
    for name, model in entry.manifest.models.items():
        standing_in = [region for region in regions_here if region.region.name == model.region]
        if not standing_in:
            raise UserError(f"{entry.path} has a {model.region}, which this recipe doesn't run from packages")
        component = standing_in[0].region.component
        if (reason := entry.manifest.identity.refusal(library.identity, component)) is not None:
            raise UserError(f"{entry.path} {reason}: it came from `{entry.manifest.built.command}`")
        tolerance = TOLERANCE_FLOAT8 if in_float8.get(component, False) else TOLERANCE[dtype]
        calls = [(region, random_inputs(specs, device)) for specs in tried(model) for region in standing_in]
        worst = max((_error(library, entry, name, *call) for call in calls), key=_nan_first)
        over_eager, farther = None, FARTHER_THAN_EAGER.get(model.region, 0.0)
        if farther and worst > tolerance == TOLERANCE["bfloat16"]:
            over_eager = max((_over_eager(library, entry, name, *call) for call in calls), key=_nan_first)
        errors.append(Error(name, len(standing_in), worst, tolerance, over_eager, farther))
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
    """Inputs of these kinds: position ids that count, times within 0..1, a rotary embedding that turns and doesn't
    stretch, which a float8 attention's scale relies on, all else normal; seeded."""
    random = torch.Generator().manual_seed(0)
    table = _rotary_table(specs, random)
    flat: dict[str, torch.Tensor] = {}
    for name, spec in specs.items():
        dtype = getattr(torch, spec.dtype)
        if name in table:
            values = table[name]
        elif name.endswith("_ids"):
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


def _rotary_table(specs: Specs, random: torch.Generator) -> dict[str, torch.Tensor]:
    """A rotary embedding [tokens, head_dim]: cosines and sines, each twice, or as `gemm_epilogues.turns` has them."""
    names = [name for name in specs if name.partition(".")[0] in ("rotary", "image_rotary_emb")]
    if not names:
        return {}
    tokens, head_dim = specs[names[0]].shape
    angles = 2 * torch.pi * torch.rand(tokens, head_dim // 2, generator=random)
    cos, sin = (x.repeat_interleave(2, dim=1) for x in (angles.cos(), angles.sin()))
    return dict(zip(names, (cos, sin) if len(names) == 2 else (turns(cos, sin),), strict=True))


def _error(library: Library, entry: Entry, name: str, region: PackagedRegion, inputs: Inputs) -> float:
    with region.unpackaged() as module:
        expected = pytree.tree_leaves(module(**inputs))
    got = pytree.tree_leaves(library.bound(region, entry, name, inputs)(inputs))
    return max((relative_error(g, e) for g, e in zip(got, expected, strict=True)), key=_nan_first)


def _over_eager(library: Library, entry: Entry, name: str, region: PackagedRegion, inputs: Inputs) -> float:
    """How far the package is from the module in float32, over how far the eager module is."""
    with region.unpackaged() as module:
        eager = pytree.tree_leaves(module(**inputs))
        tensors = (*module.named_parameters(), *module.named_buffers())
        weights = {f"module.{name}": tensor.float() for name, tensor in tensors if tensor.is_floating_point()}
        uncalled = _Uncalled(module)
        in_float32 = torch.func.functional_call(uncalled, weights, (), pytree.tree_map(torch.Tensor.float, inputs))
    package = pytree.tree_leaves(library.bound(region, entry, name, inputs)(inputs))
    outputs = zip(package, eager, pytree.tree_leaves(in_float32), strict=True)
    return max((_ratio(relative_error(p, exact), relative_error(e, exact)) for p, e, exact in outputs), key=_nan_first)


class _Uncalled(nn.Module):
    """A module without what is around its forward, which would see other weights there (`utils.changes`)."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, **inputs: Any) -> Any:
        return self.module.forward(**inputs)


def _ratio(value: float, other: float) -> float:
    return value / other if other else math.inf if value else 0.0


def _nan_first(value: float) -> float:
    return math.inf if math.isnan(value) else value
