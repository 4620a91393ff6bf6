"""What a package says of itself: what it fits, what is in it, how it was built.

The same JSON lies in the package (`extra/manifest.json`) and, with the package's size and sha256, beside it
(NAME.json), so that everything can be checked before native code is loaded.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
import platform
import types
import typing
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers import DiffusionPipeline

from utils import environment
from utils.errors import UserError
from utils.files import ROOT, permitted

if TYPE_CHECKING:  # recipes import export, to execute what it builds
    from recipes.recipe import Recipe

SCHEMA = 3
_MISSING = object()

# How a pipeline runs, and not what its graphs compute: any value of these fields takes the same package.
_NOT_IN_THE_GRAPH = (
    *("scheduler_sync_removal", "execution", "compiled_text_encoders", "cuda_graph", "loop_graph", "cache"),
    *("device_postprocessing", "hook_search_removal", "early_preparation"),
)
# Nor do these what other components' graphs compute than those that they are for.
_OF_COMPONENTS = {
    ("transformer",): (
        *("compile_scope", "attention", "quantization", "fused_kernels", "gemm_epilogues"),
        *("int8_adaln", "modulation", "hoisted_embeddings"),
    ),
    ("vae",): ("channels_last", "fused_group_norm", "vae_attention"),
    ("transformer", "vae"): ("fused_qkv",),
    ("text_encoder_2",): ("float8_text_encoder",),
}
# Sources that no graph is made of. Any other file counts, one that is added later too.
_NOT_SHAPING = (
    *("recipes/__init__.py", "recipes/apply.py", "recipes/ladder.py", "recipes/flux_fast_flags.py"),
    *("recipes/optimization.py", "recipes/recipe.py", "recipes/execution.py", "recipes/scheduler_sync.py"),
    *("recipes/step_cache.py", "recipes/text_encoders.py", "recipes/cuda_graph.py", "recipes/loop_graph.py"),
    *("recipes/weights.py", "recipes/device_postprocessing.py", "recipes/guards.py"),
    *("recipes/hook_search.py", "recipes/early_preparation.py", "recipes/euler.py"),
)
_SHAPING_OF_EXPORT = (
    *("export/regions.py", "export/text_encoders.py", "export/sizes.py", "export/build.py", "export/host_code.py"),
    *("export/conv_layouts.py",),
)
# What the decoder's graph depends on; the rest of the VAE's configuration is the encoder's and the pipeline's.
_OF_DECODER = (
    *("latent_channels", "out_channels", "up_block_types", "block_out_channels", "layers_per_block", "act_fn"),
    *("norm_num_groups", "mid_block_add_attention"),
)
# And of a text encoder, a layer's.
_OF_LAYER = {
    "text_encoder": ("hidden_size", "intermediate_size", "num_attention_heads", "hidden_act", "layer_norm_eps"),
    "text_encoder_2": (
        *("d_model", "d_kv", "d_ff", "num_heads", "feed_forward_proj", "layer_norm_epsilon"),
        *("relative_attention_num_buckets", "relative_attention_max_distance"),
    ),
}


@dataclass(frozen=True)
class TensorSpec:
    """A tensor's shape, strides in elements, and dtype by PyTorch's name ("bfloat16")."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: str

    @classmethod
    def of(cls, tensor: torch.Tensor, stride: tuple[int, ...] | None = None) -> TensorSpec:
        return cls(tuple(tensor.shape), stride or tuple(tensor.stride()), str(tensor.dtype).removeprefix("torch."))

    def __post_init__(self) -> None:
        if not isinstance(getattr(torch, self.dtype, None), torch.dtype):
            raise ValueError(f"PyTorch has no dtype {self.dtype!r}"[:200])
        if any(n < 0 for n in (*self.shape, *self.stride)) or len(self.shape) != len(self.stride):
            raise ValueError(f"no tensor is {self}"[:200])

    @property
    def short(self) -> str:
        return f"{self.dtype}{list(self.shape)}"

    def __str__(self) -> str:
        return f"{self.short} with strides {list(self.stride)}"


@dataclass(frozen=True)
class Range:
    """The sizes that a model takes, the largest among them."""

    smallest: int
    largest: int

    def __post_init__(self) -> None:
        if not 0 < self.smallest <= self.largest:
            raise ValueError(f"no sizes are from {self.smallest} to {self.largest}")


@dataclass(frozen=True)
class Model:
    """One compiled graph. `inputs` by name, in their order; the members of a tuple as `name.0`, `name.1`.

    ranges: the sizes that aren't fixed, by their names in `export.sizes`; `inputs` is one example of them. Empty: the
    model takes `inputs` of these very shapes and strides.
    weights: of the module that it stands in for, all its tensors by name. bound: those that the code reads, which have
    to be bound before it runs. weights_sha256: of a model that holds the weights itself, their hash.
    """

    region: str
    inputs: dict[str, TensorSpec]
    ranges: dict[str, Range]
    weights: dict[str, TensorSpec]
    bound: tuple[str, ...]
    weights_sha256: str | None


@dataclass(frozen=True)
class Identity:
    """What a package fits, apart from shapes; of a pipeline on a machine, what it needs.

    architecture: configuration fields by part of the pipeline. arch: the GPU's compute capability and the host's kind,
    or the CPU's kind and instruction sets. triton: on a GPU only; transformers, torchao, cudnn_frontend,
    flash_attention: where the recipe uses them. sources: a hash of the files of this repository that shape the graphs.
    """

    architecture: dict[str, dict[str, Any]]
    recipe: dict[str, Any]
    dtype: str
    device: str
    arch: str
    torch: str
    cuda: str | None
    triton: str | None
    diffusers: str | None
    transformers: str | None
    torchao: str | None
    cudnn_frontend: str | None
    flash_attention: str | None
    sources: str

    def of(self, components: Collection[str]) -> Identity:
        """What of it shapes the graphs of these parts of the pipeline: "transformer", "vae", "text_encoder" (CLIP) and
        "text_encoder_2" (T5)."""
        others = [names for theirs, names in _OF_COMPONENTS.items() if set(components).isdisjoint(theirs)]
        without = {*_NOT_IN_THE_GRAPH, *itertools.chain(*others)}
        recipe = {name: value for name, value in self.recipe.items() if name not in without}
        if recipe.get("modulation") == "offloaded":  # elsewhere, and the same in the graph
            recipe["modulation"] = "hoisted"
        architecture = {component: self.architecture.get(component, {}) for component in components}
        of_image = not {"transformer", "vae"}.isdisjoint(components)
        of_text = not {"text_encoder", "text_encoder_2"}.isdisjoint(components)
        in_torchao = recipe.get("quantization", "none") != "none" or recipe.get("float8_text_encoder", False)
        used = {
            "diffusers": of_image,
            "transformers": of_text,
            "torchao": in_torchao,
            "cudnn_frontend": "transformer" in components,
            "flash_attention": "transformer" in components,
        }
        unused: dict[str, Any] = dict.fromkeys(name for name, is_used in used.items() if not is_used)
        return dataclasses.replace(self, recipe=recipe, architecture=architecture, **unused)

    def refusal(self, here: Identity, component: str) -> str | None:
        """Why a package of this identity doesn't fit `here`, naming both sides; None if it does.

        component: the part of the pipeline that it is wanted for.
        """
        theirs, ours = self.of([component]), here.of([component])
        if (name := _first_different(theirs.recipe, ours.recipe)) is not None:
            there, wanted = (_word(recipe.get(name)) for recipe in (theirs.recipe, ours.recipe))
            return f"was built for {name}={there}, the recipe here has {wanted}"
        parts = theirs.architecture[component], ours.architecture[component]
        if (name := _first_different(*parts)) is not None:
            there, wanted = (_word(part.get(name)) for part in parts)
            return f"was built for a {component} with {name}={there}, this one has {wanted}"
        return _misfit(vars(theirs), vars(ours))


@dataclass(frozen=True)
class Built:
    """How a package was built: `command` or "at the first call", `seconds` of it, `date` in UTC."""

    command: str
    checkpoint: str
    seconds: float
    date: str


@dataclass(frozen=True)
class Manifest:
    schema: int
    identity: Identity
    models: dict[str, Model]
    built: Built

    def __post_init__(self) -> None:
        if not self.models:
            raise ValueError("manifest.models is empty")

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1)


@dataclass(frozen=True)
class Beside:
    """The file beside a package: its manifest, and the package's size in bytes and sha256."""

    manifest: Manifest
    size: int
    sha256: str

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1)


class OtherVersionError(UserError, ValueError):
    """Another version of this program wrote it."""


def read_beside(path: Path) -> Beside:
    """Raises UserError: the file can't be read, or isn't what this repository writes; ForbiddenError: its permissions
    don't allow to read it; OtherVersionError: it is no longer what this repository writes."""
    try:
        with permitted("read"):
            text = path.read_text()
        return parse_beside(text)
    except OtherVersionError as error:
        raise OtherVersionError(
            f"{path} is of another version of this program ({error}): build the package again"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} is damaged ({error}): delete it and {path.stem}.pt2, and build the package again"
        ) from None


def parse_beside(text: str) -> Beside:
    """Raises ValueError: it isn't what this repository writes; OtherVersionError: no longer."""
    try:
        value = json.loads(text)
        schema = _expect(int, value["manifest"]["schema"], "manifest.schema")
        if schema != SCHEMA:
            raise OtherVersionError(f"its schema is {schema}, this program reads {SCHEMA}")
        return decode(Beside, value, "")
    except (TypeError, KeyError, RecursionError) as error:  # the last of JSON that is nested too deep
        raise ValueError(str(error)) from None


def decode(kind: Any, value: Any, where: str) -> Any:
    """JSON's `value` as the type `kind`, a dataclass or what its fields are.

    Raises:
        ValueError: a field is missing, unknown, or of another type.
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind, {**globals(), "torch": torch})
        fields = _expect(dict, value, where)
        wrong = sorted(set(hints) ^ set(fields))
        if wrong:
            raise ValueError(f"{where}.{wrong[0]} is {'missing' if wrong[0] in hints else 'unknown'}".lstrip("."))
        return typing.cast(Any, kind)(**{n: decode(hint, fields[n], f"{where}.{n}") for n, hint in hints.items()})
    if origin is dict:
        items = _expect(dict, value, where).items()
        return {name: decode(arguments[1], member, f"{where}.{name}") for name, member in items}
    if origin is tuple:
        members = _expect(list, value, where)
        return tuple(decode(arguments[0], member, f"{where}[{i}]") for i, member in enumerate(members))
    if origin in (typing.Union, types.UnionType):
        return None if value is None else decode(arguments[0], value, where)
    return value if kind is Any else _expect(kind, value, where)


def _expect(kind: type, value: Any, where: str) -> Any:
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise ValueError(f"{where.lstrip('.') or 'it'} is {value!r}, not of type {kind.__name__}"[:200])
    return value


def identify(pipe: DiffusionPipeline, recipe: Recipe) -> Identity:
    """What a package must be to fit this pipeline, recipe, machine and these versions."""
    device, vae = pipe.transformer.device, getattr(pipe, "vae", None)
    return Identity(
        architecture={
            "transformer": _plain({n: v for n, v in pipe.transformer.config.items() if not n.startswith("_")}),
            "vae": {} if vae is None else _plain({name: vae.config[name] for name in _OF_DECODER}),
            **(_of_text_encoders(pipe) if recipe.compiled_text_encoders else {}),
        },
        recipe=_plain(recipe.to_dict()),
        dtype=str(pipe.transformer.dtype).removeprefix("torch."),
        **of_machine(device),
        diffusers=environment.version("diffusers") or "unknown",
        transformers=environment.version("transformers") if recipe.compiled_text_encoders else None,
        torchao=environment.version("torchao") if recipe.quantization != "none" or recipe.float8_text_encoder else None,
        # attention=cudnn is PyTorch's own, which comes with torch.
        cudnn_frontend=environment.version("nvidia-cudnn-frontend") if recipe.attention == "cudnn_fp8" else None,
        flash_attention=_flash_attention() if recipe.attention.startswith("fa3") else None,
        sources=sources(),
    )


def of_machine(device: torch.device) -> dict[str, Any]:
    """The fields of an identity that a device and its software decide, by name."""
    cuda = device.type == "cuda"
    return {
        "device": device.type,
        "arch": f"{gpu_arch(device)} {platform.machine()}" if cuda else cpu_arch(),
        "torch": str(torch.__version__),
        "cuda": torch.version.cuda if cuda else None,
        "triton": environment.version("triton") if cuda else None,
    }


def refusal_by_machine(identity: Identity, device: torch.device) -> str | None:
    """Why a package of this identity can't run on `device`, naming both sides; None if it may. Wants no pipeline."""
    here = of_machine(device)
    return _misfit({name: vars(identity)[name] for name in here}, here)


def _misfit(theirs: dict[str, Any], ours: dict[str, Any]) -> str | None:
    """The first field by which a package doesn't fit, with both sides; None if it fits."""
    if (name := _first_different(theirs, ours)) is None:
        return None
    there, wanted = (_word(fields[name])[:40] for fields in (theirs, ours))
    what = "other sources of this repository" if name == "sources" else name
    return f"was built for {what} {there}, this is {wanted}"


def _of_text_encoders(pipe: DiffusionPipeline) -> dict[str, dict[str, Any]]:
    """Of each encoder the fields that shape a layer, and the implementation of attention that transformers takes."""
    found = {}
    for name, fields in _OF_LAYER.items():
        config = getattr(pipe, name).config
        found[name] = {**{field: getattr(config, field) for field in fields}, "attention": config._attn_implementation}
    return _plain(found)


def _flash_attention() -> str:
    """What FlashAttention-3 comes from: its own package, or else a build that `kernels` fetches."""
    names = ("flash_attn_3", "kernels")
    found = {name: version for name in names if (version := environment.version(name)) is not None}
    return next((f"{name} {version}" for name, version in found.items()), "unknown")


def gpu_arch(device: torch.device) -> str:
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def cpu_arch() -> str:
    """The kind of machine and the instruction sets that Inductor compiles for: "x86_64 AVX512 BF16 VNNI AMX"."""
    words = [platform.machine(), torch.backends.cpu.get_cpu_capability()]
    words += ["BF16"] if torch.cpu._is_avx512_bf16_supported() else []
    words += ["VNNI"] if torch.cpu._is_vnni_supported() else []
    words += ["AMX"] if torch.cpu._is_amx_tile_supported() else []
    words += ["AMX-FP16"] if torch.cpu._is_amx_fp16_supported() else []
    return " ".join(words)


@functools.cache
def sources() -> str:
    """A hash of the code that shapes the graphs, or whose machine code a package holds: what is exported is partly this
    repository's own."""
    digest = hashlib.sha256()
    kinds = ("*.py", "*.cu", "*.cuh")
    names = {str(path.relative_to(ROOT)) for kind in kinds for path in (ROOT / "recipes").rglob(kind)}
    for name in sorted({*(names - set(_NOT_SHAPING)), *_SHAPING_OF_EXPORT}):
        digest.update(name.encode() + b"\0" + (ROOT / name).read_bytes())
    return digest.hexdigest()


def content_key(identity: Identity, components: Collection[str], models: dict[str, Model]) -> str:
    """Sixteen hex digits over all that decides what a package's code is, known before it is compiled.

    components: the parts of the pipeline whose models they are.
    """
    contents = {
        "schema": SCHEMA,
        "identity": dataclasses.asdict(identity.of(components)),
        "models": {name: {**dataclasses.asdict(model), "bound": ()} for name, model in models.items()},
    }
    return hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()[:16]


def _first_different(one: dict[str, Any], other: dict[str, Any]) -> str | None:
    """The first name whose values differ, or that only one has."""
    names = dict.fromkeys((*other, *one))
    return next((n for n in names if one.get(n, _MISSING) != other.get(n, _MISSING)), None)


def _plain(value: Any) -> Any:
    """As JSON gives it back: tuples as lists."""
    return json.loads(json.dumps(value))


def _word(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
