"""One package: a module's graph, compiled for fixed input shapes, without the weights.

The weights stay in the module and are bound to the loaded package by name, so that a package is small, and fits every
checkpoint of the same architecture.
"""

from __future__ import annotations

import functools
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from utils import environment
from utils.compile_clock import compilation
from utils.errors import UserError
from utils.files import ROOT, replacing

_PACKAGES = ("torch", "triton", "diffusers", "torchao", "nvidia-cudnn-frontend")

if TYPE_CHECKING:  # recipes import export, to execute what it builds
    from recipes.recipe import Recipe


def signature(args: tuple, kwargs: dict[str, Any]) -> str:
    """What a package is specialised to: every tensor's shape, strides, dtype and device, and every other argument."""
    leaves, spec = pytree.tree_flatten((args, kwargs))
    words = [
        f"{x.dtype}{list(x.shape)}{x.stride()}@{x.device.type}" if isinstance(x, torch.Tensor) else repr(x)
        for x in leaves
    ]
    return f"{spec}{words}"


@functools.cache
def sources() -> str:
    """A hash of the code that shapes the graphs: what is exported is partly this repository's own."""
    digest = hashlib.sha256()
    for path in sorted([*(ROOT / "recipes").rglob("*.py"), *(ROOT / "export").glob("*.py")]):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def default_folder() -> Path:
    return Path.home() / ".cache" / "flux-fast"


@dataclass
class PackageStore:
    """A folder of packages, named by what they are specialised to; `build`: whether to build what is missing."""

    folder: Path = field(default_factory=default_folder)
    build: bool = True

    def path(self, part: str, module: nn.Module, recipe: Recipe, inputs: str) -> Path:
        state = {name: (list(t.shape), str(t.dtype)) for name, t in module.state_dict().items()}
        device = next(module.parameters()).device
        machine = (
            torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
        )
        versions = {name: environment.version(name) for name in _PACKAGES}
        key = json.dumps([part, state, recipe.to_dict(), inputs, versions, machine, sources()], sort_keys=True)
        return self.folder / f"{part}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.pt2"

    def get(self, part: str, module: nn.Module, recipe: Recipe, options: dict, args: tuple, kwargs: dict) -> Any:
        """The loaded package for these inputs, its weights bound to the module's; built first if it isn't there.

        Raises:
            UserError: it isn't there, and `build` is off.
        """
        path = self.path(part, module, recipe, signature(args, kwargs))
        if not path.exists():
            if not self.build:
                raise UserError(
                    f"no package {path.name} in {self.folder}: run once without --use-cached-model to build it"
                )
            self.folder.mkdir(parents=True, exist_ok=True)
            with compilation(path.name):
                _build(path, module, options, args, kwargs)
        package = torch._inductor.aoti_load_package(str(path), run_single_threaded=True)
        weights = exported_tensors(module)
        names = set(package.get_constant_fqns())
        missing = sorted(names - set(weights))
        if missing:
            raise UserError(f"{path.name} wants weights that the model lacks: {missing[0]} and {len(missing) - 1} more")
        package.load_constants({n: weights[n].detach() for n in names}, check_full_update=True, user_managed=True)
        return package


def exported_tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """A module's parameters and buffers by the names that torch.export gives them.

    A tensor subclass, such as float8's weight with its scale, counts as its inner tensors, which export names as those
    of a parametrization.
    """
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if is_traceable_wrapper_subclass(tensor):
            owner, _, leaf = name.rpartition(".")
            inner, _ = tensor.__tensor_flatten__()
            parts = {f"{owner}.parametrizations.{leaf}.original{i}": getattr(tensor, n) for i, n in enumerate(inner)}
            tensors |= parts
        else:
            tensors[name] = tensor
    return tensors


def _build(path: Path, module: nn.Module, options: dict, args: tuple, kwargs: dict) -> None:
    exported = torch.export.export(module, args, kwargs, strict=False)
    configuration = {
        **options,
        "aot_inductor.package_constants_in_so": False,
        "always_keep_tensor_constants": True,
        # Inductor's C++ GEMMs repack weights while compiling, into constants that only a package with weights can hold.
        "max_autotune_gemm_backends": "ATEN,TRITON",
    }
    with replacing(path) as temporary:
        torch._inductor.aoti_compile_and_package(exported, package_path=str(temporary), inductor_configs=configuration)
