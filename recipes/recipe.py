"""A recipe: everything that decides how a pipeline runs, as one frozen value."""

from __future__ import annotations

import hashlib
import json
import sys
import typing
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

from utils.errors import UsageError


class RecipeError(UsageError):
    """A recipe that contradicts itself or can't be applied here."""


# These say how to compile, and mean nothing to an eager recipe.
COMPILER_FIELDS = ("compile_scope", "max_autotune", "inductor_flags", "compiled_text_encoders")


@dataclass(frozen=True)
class InductorFlags:
    """torch._inductor.config entries for one compilation; None leaves PyTorch's default."""

    conv_1x1_as_mm: bool | None = None
    epilogue_fusion: bool | None = None
    coordinate_descent_tuning: bool | None = None
    coordinate_descent_check_all_directions: bool | None = None

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value is not None and not isinstance(value, bool):
                raise RecipeError(f"inductor_flags: {name} is true, false or null, not {value!r}")

    def options(self) -> dict[str, bool]:
        """Those that are set, as torch.compile's `options` takes them."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class FirstBlockCache:
    """Skip the other blocks while the first one's residual changes by less than `threshold` (diffusers' own cache)."""

    threshold: float = 0.08

    def __post_init__(self) -> None:
        _check_number(self, "threshold", 0)


@dataclass(frozen=True)
class StepSkipping:
    """Compute one of `speed_factor` steps, and extrapolate the others from those before (recipes/step_cache.py)."""

    speed_factor: float

    def __post_init__(self) -> None:
        _check_number(self, "speed_factor", 1)


Cache = FirstBlockCache | StepSkipping


def _check_number(cache: Cache, name: str, least: int) -> None:
    """Raise RecipeError unless the field is a number of at least so much; make it a float."""
    value = getattr(cache, name)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise RecipeError(f"cache: {name} is a number, not {value!r}")
    if not least <= value <= sys.float_info.max:
        raise RecipeError(f"cache: {name} is {least} or more, not {value}")
    object.__setattr__(cache, name, float(value))  # 2 and 2.0 are one recipe, with one hash


@dataclass(frozen=True)
class Recipe:
    """The default is the plainest way to run: float32, eager, nothing fused.

    Raises:
        RecipeError: a value is not among a field's, or a field has no effect beside the others.
    """

    dtype: Literal["float32", "bfloat16"] = "float32"
    scheduler_sync_removal: bool = False
    execution: Literal["eager", "compile", "aoti"] = "eager"
    compile_scope: Literal["regional", "whole"] = "regional"
    max_autotune: bool = False
    fused_qkv: bool = False
    channels_last: bool = False
    attention: Literal["native", "cudnn", "fa3", "fa3_fp8", "cudnn_fp8", "triton_fp8", "wgmma_fp8"] = "native"
    quantization: Literal["none", "float8_per_row", "float8_per_tensor"] = "none"
    fused_kernels: bool = False
    gemm_epilogues: bool = False
    int8_adaln: bool = False
    fused_group_norm: bool = False
    vae_attention: Literal["native", "gemm"] = "native"
    hook_search_removal: bool = False
    early_preparation: bool = False
    device_postprocessing: bool = False
    inductor_flags: InductorFlags = InductorFlags()
    cache: Cache | None = None
    modulation: Literal["per_step", "hoisted", "offloaded"] = "per_step"
    hoisted_embeddings: bool = False
    compiled_text_encoders: bool = False
    float8_text_encoder: bool = False
    cuda_graph: bool = False
    loop_graph: bool = False

    def __post_init__(self) -> None:
        for name, hint in typing.get_type_hints(Recipe).items():
            value = getattr(self, name)
            if typing.get_origin(hint) is Literal and value not in typing.get_args(hint):
                raise RecipeError(f"{name} is one of {', '.join(typing.get_args(hint))}, not {value!r}")
            if hint is bool and not isinstance(value, bool):
                raise RecipeError(f"{name} is true or false, not {value!r}")
        if self.fused_kernels:
            self._check_fused_kernels()
        if self.gemm_epilogues:
            self._check_gemm_epilogues()
        if self.int8_adaln and not self.gemm_epilogues:
            raise RecipeError("int8_adaln needs gemm_epilogues=true")
        if self.fused_group_norm and not self.channels_last:
            raise RecipeError("fused_group_norm needs channels_last=true")
        if self.loop_graph and not self.cuda_graph:
            raise RecipeError("loop_graph needs cuda_graph=true")
        if self.loop_graph and not self.scheduler_sync_removal:
            raise RecipeError("loop_graph needs scheduler_sync_removal=true")
        if not isinstance(self.inductor_flags, InductorFlags):
            raise RecipeError(f"inductor_flags takes a JSON object of its fields, not {self.inductor_flags!r}")
        if not (self.cache is None or isinstance(self.cache, Cache)):
            raise RecipeError(f"cache is null or a JSON object of its fields, not {self.cache!r}")
        if self.execution == "eager":
            idle = [name for name in COMPILER_FIELDS if getattr(self, name) != default(name)]
            if idle:
                raise RecipeError(f"{idle[0]} has no effect with execution=eager: use execution=compile or aoti")
        if isinstance(self.cache, FirstBlockCache):
            self._check_first_block_cache()

    def differences(self, other: Recipe) -> list[str]:
        """The names of the fields in which two recipes differ."""
        return [f.name for f in fields(self) if getattr(self, f.name) != getattr(other, f.name)]

    def without(self, name: str) -> Recipe:
        """This recipe with field `name` at its default, and with it the fields that mean nothing then."""
        dependent = {
            "execution": COMPILER_FIELDS,
            "dtype": ("fused_kernels", "gemm_epilogues", "int8_adaln"),
            "fused_qkv": ("fused_kernels", "gemm_epilogues", "int8_adaln"),
            "fused_kernels": ("gemm_epilogues", "int8_adaln"),
            "quantization": ("gemm_epilogues", "int8_adaln"),
            "attention": ("gemm_epilogues", "int8_adaln"),
            "gemm_epilogues": ("int8_adaln",),
            "channels_last": ("fused_group_norm",),
            "cuda_graph": ("loop_graph",),
            "scheduler_sync_removal": ("loop_graph",),
        }
        names = (name, *dependent.get(name, ()))
        return replace(self, **{n: default(n) for n in names})

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Recipe:
        """The recipe of `to_dict`'s values, or of some of them, as JSON gives them back.

        Raises:
            RecipeError: an unknown field, or a value that isn't among a field's.
        """
        nested: dict[str, tuple[type, ...]] = {
            "inductor_flags": (InductorFlags,),
            "cache": (FirstBlockCache, StepSkipping),
        }
        unknown = sorted(set(values) - {f.name for f in fields(cls)})
        if unknown:
            raise RecipeError(f"a recipe has no field {unknown[0]!r}")
        decoded = dict(values)
        for name, kinds in nested.items():
            given = values.get(name)
            if isinstance(given, dict):
                names = {kind: [f.name for f in fields(kind)] for kind in kinds}
                kind = next((kind for kind in kinds if set(given) <= set(names[kind])), None)
                if kind is None:
                    known = "; or ".join(", ".join(of_kind) for of_kind in names.values())
                    raise RecipeError(f"{name} takes a JSON object of its fields ({known}), not {given!r}")
                decoded[name] = kind(**given)
        return cls(**decoded)

    @property
    def hash(self) -> str:
        """Twelve hex digits over the fields that differ from the default: a field added later changes no hash."""
        values = {name: asdict(self)[name] for name in self.differences(type(self)())}
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]

    def _check_fused_kernels(self) -> None:
        for name, values in {
            "dtype": ("bfloat16",),
            "fused_qkv": (True,),
            "quantization": ("none", "float8_per_row"),
        }.items():
            if getattr(self, name) not in values:
                wanted = " or ".join(str(value).lower() for value in values)
                raise RecipeError(f"fused_kernels needs {name}={wanted}")

    def _check_gemm_epilogues(self) -> None:
        for name, value in {
            "fused_kernels": True,
            "quantization": "float8_per_row",
            "attention": "wgmma_fp8",
        }.items():
            if getattr(self, name) != value:
                raise RecipeError(f"gemm_epilogues needs {name}={str(value).lower()}")

    def _check_first_block_cache(self) -> None:
        instead = 'or skip steps with cache={"speed_factor":2}'
        for name, value, why in (
            ("execution", "eager", "its decision at each step can't be compiled into one graph"),
            ("hook_search_removal", False, "it is a hook"),
            ("cuda_graph", False, "its decision at each step can't be captured in one graph"),
        ):
            if getattr(self, name) != value:
                raise RecipeError(f"cache with a threshold needs {name}={str(value).lower()}: {why}; {instead}")


def default(name: str) -> Any:
    """The default of a recipe's field: what "off" means for it."""
    return getattr(Recipe, name)
