"""Compile regions with torch.export and AOTInductor, and put them into one .pt2 file with a manifest."""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import shutil
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export.pt2_archive import _package as pt2
from torch.utils import _pytree as pytree

from export import assumptions, conv_layouts, host_code, host_compiler, regions, sizes, weights
from export.manifest import SCHEMA, Built, Identity, Manifest, Model, Range, TensorSpec
from export.regions import Inputs, Region
from recipes.kernels import cuda_kernel
from recipes.kernels.cuda_kernel import CudaKernel
from utils.compile_clock import compilation
from utils.errors import UserError, one_line, ran_out_of_memory, refused

MANIFEST_RECORD = "extra/manifest.json"
_KERNELS = "extra/kernels"
_COMPRESSED_BELOW = 64 * 2**20  # bytes of a record; weights don't get smaller, and take minutes
# What the code was made from. The wrapper's source stays: by its name torch 2.11 finds the model's metadata.
_NOT_LOADED = (".kernel.cpp", ".h", ".o")
# An absolute path within an argument (--out=/a/b, a job as JSON), its last name as a group.
_ABSOLUTE = re.compile(r"""(?<![^\s"'=])/(?:[^\s"'/]+/)*([^\s"'/]+)""")


@dataclass(frozen=True)
class Call:
    """A region's call, to be compiled: its module as it runs without packages, and example inputs.

    ranges: the sizes that the model is to take, of those that aren't to be fixed.
    """

    region: Region
    module: nn.Module
    inputs: Inputs
    ranges: dict[str, Range] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The model's name in a package: the region, and a hash of what inputs it takes."""
        spec = repr([sorted(input_specs(self.inputs).items()), sorted(self.ranges.items())])
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


def over_ranges(calls: Iterable[Call]) -> list[Call]:
    """One call for all those of a region that differ in their sizes alone: the largest of them, with their ranges. They
    stay besides where the region is slower so: of the sizes that were ordered each has its model.

    Raises:
        UserError: a range begins at 1, a size which torch.export takes for fixed.
    """
    alike: dict[tuple[str, str], list[Call]] = {}
    for call in calls:
        specs = input_specs(call.inputs)
        fixed = sizes.at(specs, dict.fromkeys(sizes.of(specs), 0))
        alike.setdefault((call.region.name, repr(fixed)), []).append(call)
    merged = []
    for group in alike.values():
        largest = max(group, key=lambda call: sizes.area(input_specs(call.inputs)))
        ranges = sizes.ranges([input_specs(call.inputs) for call in group])
        for name, one in ranges.items():
            if one.smallest < 2:
                raise UserError(f"no model takes {sizes.words(name, one)}: order sizes from 2 on, or without --dynamic")
        inputs = pytree.tree_map(_own, largest.inputs) if ranges else largest.inputs
        merged.append(replace(largest, inputs=inputs, ranges=ranges))
        if ranges and largest.region.slower_over_ranges:
            merged += group
    return merged


def planned(calls: Iterable[Call], embed_weights: bool) -> dict[str, Model]:
    """The manifest's models of these calls, before they are compiled: without the names of the weights they read."""
    models = {}
    for call in calls:
        tensors = weights.exported_tensors(call.module)
        models[call.name] = Model(
            region=call.region.name,
            inputs=input_specs(call.inputs),
            ranges=call.ranges,
            weights=weights.specs(tensors),
            bound=(),
            weights_sha256=weights.fingerprint(tensors) if embed_weights else None,
        )
    return models


def build(
    path: Path, identity: Identity, calls: dict[str, Call], models: dict[str, Model], options: dict, checkpoint: str
) -> Manifest:
    """Compile `calls` into the package `path`, a .pt2 file; `models` are theirs as `planned`.

    options: Inductor's configuration entries. Each model counts as a compilation (`utils.compile_clock`).

    Raises:
        UserError: a model can't be compiled, or not be loaded afterwards. Where memory ran out, what says so is raised.
    """
    started, date = time.perf_counter(), datetime.now(UTC).isoformat(timespec="seconds")
    with tempfile.TemporaryDirectory(prefix=f"{path.stem}-", dir=path.parent) as folder:
        embed_weights = any(model.weights_sha256 for model in models.values())
        with _advising_of_doctor("the package can't be compiled"):
            files = _compiled(calls, options, embed_weights)
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


def _compiled(calls: dict[str, Call], options: dict[str, Any], embed_weights: bool) -> dict[str, list[Any]]:
    """AOTInductor's files of each model, as a package needs them."""
    files: dict[str, list[Any]] = {}
    libraries: list[tuple[Call, Future[None]]] = []
    with nullcontext() if embed_weights else host_compiler.beside() as compilers:
        for number, (name, call) in enumerate(calls.items(), 1):
            with compilation(f"{name} ({number} of {len(calls)})"):
                files[name] = _needed(compile_call(call, options, embed_weights))
                if compilers is not None:
                    libraries += [(call, library) for library in compilers.linked()]
                _raise_failures(libraries, wait=number == len(calls))
    return files


def _raise_failures(libraries: list[tuple[Call, Future[None]]], wait: bool) -> None:
    """Of the libraries that are done; wait: of all."""
    for call, library in libraries:
        if wait or library.done():
            with _advising_of_ranges(call):
                library.result()


def compile_call(call: Call, options: dict[str, Any], embed_weights: bool) -> list[Any]:
    """AOTInductor's files for one region's call.

    Raises:
        UserError: a graph for a range of sizes can't be had. Of fixed sizes whatever the compiler raises.
    """
    (device,) = {leaf.device for leaf in pytree.tree_leaves(call.inputs) if isinstance(leaf, torch.Tensor)}
    configuration = {
        **options,
        "aot_inductor.package": True,
        "aot_inductor.package_constants_in_so": embed_weights,
        "always_keep_tensor_constants": not embed_weights,
        # Weights of one element, such as one scale per tensor, would be made part of the code: one block's, for all.
        # Without them folding stays, for it took a step of the embedded model on a CPU from 16 to 12 ms.
        "joint_graph_constant_folding": embed_weights or not _has_weight_of_one_element(call.module),
        # Inductor's C++ GEMMs repack weights while compiling, into constants that only a package with weights can hold.
        "max_autotune_gemm_backends": "ATEN,TRITON",
    }
    shapes = sizes.dynamic_shapes(call.inputs, call.ranges, sizes.of(input_specs(call.inputs)))
    with (
        _advising_of_ranges(call),
        torch.no_grad(),
        conv_layouts.as_computed(call.module),
        host_code.portable(device) as entries,
    ):
        exported = torch.export.export(call.module, (), call.inputs, dynamic_shapes=shapes, strict=False)
        graph = exported.module(check_guards=False)
        _refuse_assumptions(graph, call)  # before the compiler takes its time
        files = torch._inductor.aot_compile(graph, (), call.inputs, options={**configuration, **entries})
        _refuse_assumptions(graph, call)
    assert isinstance(files, list)
    return files


@contextmanager
def _advising_of_ranges(call: Call) -> Iterator[None]:
    """Of a range of sizes that can't be compiled, say what to do."""
    try:
        yield
    except Exception as error:
        if not call.ranges:
            raise
        of_range = ", ".join(sizes.words(name, one) for name, one in call.ranges.items())
        raise UserError(
            f"the {call.region.name} can't be compiled for {of_range} ({one_line(error)}): build it without --dynamic"
        ) from error


@contextmanager
def _advising_of_doctor(failure: str) -> Iterator[None]:
    """Of errors in compiling, and in loading what was compiled, say what finds out why; but of memory that ran out."""
    before = refused()
    try:
        yield
    except Exception as error:
        if isinstance(error, (UserError, OSError)) or ran_out_of_memory(error, before):
            raise
        raise UserError(
            f"{failure} ({type(error).__name__}: {one_line(error)}): `python -m export doctor` says whether it is the "
            "compiler here"
        ) from error


def add_kernels(path: Path, kernels: Iterable[CudaKernel]) -> None:
    """Put the machine code of CUDA C++ kernels into a package, beside its models."""
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        root = archive.namelist()[0].split("/")[0]
        for kernel in sorted(kernels, key=lambda one: one.key):
            archive.writestr(f"{root}/{_KERNELS}/{kernel.key}.cubin", cuda_kernel.machine_code(kernel))


def provide_kernels(path: Path) -> None:
    """Take the machine code that `add_kernels` put into a package for granted: check the file first."""
    with zipfile.ZipFile(path) as archive:
        records = [Path(name) for name in archive.namelist() if f"/{_KERNELS}/" in name]
        cuda_kernel.provide({record.stem: archive.read(str(record)) for record in records})


def loader(path: Path, name: str, device_index: int) -> Any:
    """AOTInductor's loader of one model of a package. It runs the package's code: check it first.

    Raises:
        UserError: it can't be loaded here.
    """
    # Not torch._inductor.package.load_package, which loads all models for the sake of one.
    with _advising_of_doctor(f"{name} can't be loaded from its package"):
        return torch._C._aoti.AOTIModelPackageLoader(str(path), name, True, 1, device_index)


def command_line() -> str:
    """The command that this process was started with, of absolute paths the last name alone: others will read it."""
    program, *arguments = sys.argv or [""]
    name = "-m export" if program.endswith("export/__main__.py") else os.path.basename(program)
    return f"python {name} {shlex.join(map(_without_folders, arguments))}".strip()


def _without_folders(argument: str) -> str:
    if os.path.isabs(argument):  # as a whole, for a folder's name may hold spaces
        return os.path.basename(os.path.normpath(argument))
    return _ABSOLUTE.sub(r"\1", argument)


def _refuse_assumptions(graph: torch.fx.GraphModule, call: Call) -> None:
    """Raise ValueError if what was taken for given so far isn't so of all sizes of a call's ranges."""
    if call.ranges and (assumed := assumptions.broken(graph, input_specs(call.inputs), call.ranges)):
        raise ValueError(f"it is taken for given that {assumed}")


def _has_weight_of_one_element(module: nn.Module) -> bool:
    return any(tensor.numel() == 1 for tensor in weights.exported_tensors(module).values())


def _own(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous copy: torch.export marks what it is given, for good where it fails."""
    return tensor.clone(memory_format=torch.contiguous_format)


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
