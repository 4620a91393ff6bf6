"""Compile regions with torch.export and AOTInductor, and put them into one .pt2 file with a manifest."""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export.pt2_archive import _package as pt2
from torch.utils import _pytree as pytree

from export import regions, weights
from export.manifest import SCHEMA, Built, Identity, Manifest, Model, TensorSpec
from export.regions import Inputs, Region
from utils.compile_clock import compilation

MANIFEST_RECORD = "extra/manifest.json"
_COMPRESSED_BELOW = 64 * 2**20  # bytes of a record; weights don't get smaller, and take minutes
# What the code was made from. The wrapper's source stays: by its name torch 2.11 finds the model's metadata.
_NOT_LOADED = (".kernel.cpp", ".h", ".o")


@dataclass(frozen=True)
class Call:
    """A region's call, to be compiled: its module as it runs without packages, and example inputs."""

    region: Region
    module: nn.Module
    inputs: Inputs

    @property
    def name(self) -> str:
        """The model's name in a package: the region, and a hash of what inputs it takes."""
        spec = repr(sorted(input_specs(self.inputs).items()))
        return f"{self.region.name}-{hashlib.sha256(spec.encode()).hexdigest()[:8]}"


def input_specs(inputs: Inputs) -> dict[str, TensorSpec]:
    """A model's inputs as its manifest has them."""
    specs: dict[str, TensorSpec] = {}
    for name, value in inputs.items():
        leaves = pytree.tree_leaves(value)
        names = [name] if isinstance(value, torch.Tensor) else [f"{name}.{i}" for i in range(len(leaves))]
        for leaf_name, tensor in zip(names, leaves, strict=True):
            specs[leaf_name] = TensorSpec.of(tensor, regions.strides(tensor))
    return specs


def planned(calls: Iterable[Call], embed_weights: bool) -> dict[str, Model]:
    """The manifest's models of these calls, before they are compiled: without the names of the weights they read."""
    models = {}
    for call in calls:
        tensors = weights.exported_tensors(call.module)
        models[call.name] = Model(
            region=call.region.name,
            inputs=input_specs(call.inputs),
            weights=weights.specs(tensors),
            bound=(),
            weights_sha256=weights.fingerprint(tensors) if embed_weights else None,
        )
    return models


def build(
    path: Path, identity: Identity, calls: dict[str, Call], models: dict[str, Model], options: dict, checkpoint: str
) -> Manifest:
    """Compile `calls` into the package `path`, a .pt2 file; `models` are theirs as `planned`.

    options: Inductor's configuration entries. Each model counts as a compilation (`utils.compile_clock`). Whatever the
    compiler raises is raised.
    """
    started, date = time.perf_counter(), datetime.now(UTC).isoformat(timespec="seconds")
    with tempfile.TemporaryDirectory(prefix=f"{path.stem}-", dir=path.parent) as folder:
        files = {}
        for number, (name, call) in enumerate(calls.items(), 1):
            with compilation(f"{name} ({number} of {len(calls)})"):
                files[name] = _needed(compile_call(call, options, models[name].weights_sha256 is not None))
        draft = Path(folder) / "package.pt2"
        pt2.package_pt2(str(draft), aoti_files=files)
        done = {}
        for name, model in models.items():
            names = () if model.weights_sha256 else loader(draft, name, -1).get_constant_fqns()
            done[name] = replace(model, bound=tuple(sorted(names)))
        built = Built(command_line(), checkpoint, round(time.perf_counter() - started, 1), date)
        manifest = Manifest(SCHEMA, identity, done, built)
        _write(draft, path, manifest)
    return manifest


def compile_call(call: Call, options: dict[str, Any], embed_weights: bool) -> list[Any]:
    """AOTInductor's files for one region's call."""
    configuration = {
        **options,
        "aot_inductor.package": True,
        "aot_inductor.package_constants_in_so": embed_weights,
        "always_keep_tensor_constants": not embed_weights,
        # Inductor's C++ GEMMs repack weights while compiling, into constants that only a package with weights can hold.
        "max_autotune_gemm_backends": "ATEN,TRITON",
    }
    with torch.no_grad():
        exported = torch.export.export(call.module, (), call.inputs, strict=False)
        files = torch._inductor.aot_compile(exported.module(check_guards=False), (), call.inputs, options=configuration)
    assert isinstance(files, list)
    return files


def loader(path: Path, name: str, device_index: int) -> Any:
    """AOTInductor's loader of one model of a package. It runs the package's code: check it first."""
    # Not torch._inductor.package.load_package, which loads all models for the sake of one.
    return torch._C._aoti.AOTIModelPackageLoader(str(path), name, True, 1, device_index)


def command_line() -> str:
    """The command that this process was started with, without the folders of this machine."""
    program = sys.argv[0] if sys.argv else ""
    name = "-m export" if program.endswith("export/__main__.py") else os.path.basename(program)
    return f"python {name} {shlex.join(sys.argv[1:])}".strip()


def _needed(files: list[Any]) -> list[Any]:
    return [file for file in files if not (isinstance(file, str) and file.endswith(_NOT_LOADED))]


def _write(draft: Path, path: Path, manifest: Manifest) -> None:
    """The draft's records and the manifest into `path`, compressed: machine code gets four times smaller."""
    with zipfile.ZipFile(draft) as source, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target:
        root = source.namelist()[0].split("/")[0]
        for record in source.infolist():
            large = record.file_size >= _COMPRESSED_BELOW
            copy = zipfile.ZipInfo(record.filename)
            copy.compress_type = zipfile.ZIP_STORED if large else zipfile.ZIP_DEFLATED
            with source.open(record) as read, target.open(copy, "w", force_zip64=large) as write:
                shutil.copyfileobj(read, write, 2**24)
        target.writestr(f"{root}/{MANIFEST_RECORD}", manifest.to_json())
