"""Run a pipeline's models from packages: find them, check them, bind the weights, call them."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers import DiffusionPipeline
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import nn
from torch.utils import _pytree as pytree
from tqdm import tqdm

from export import build, regions, sizes, text_encoders, weights
from export.build import Call
from export.build_command import Sizes, TransformerCall, build_command, in_words
from export.checks import check_file, refusal
from export.manifest import Identity, Manifest, Model, content_key, identify
from export.regions import Inputs, Key, Region
from export.store import Entry, PackageStore, not_yet_stored, state
from export.verify import verify
from recipes import hoisting
from recipes.kernels import cuda_kernel
from utils import checkpoints
from utils.changes import when_changed
from utils.errors import UserError
from utils.request import Request

if TYPE_CHECKING:  # recipes import export, to execute what it builds
    from recipes.recipe import Recipe


class BoundModel:
    """A package's model with a module's weights: it can't be had without them, and would crash.

    The weights aren't copied: values written to them in place count at the next call. Of weights that are given other
    memory, it goes on reading the old: then there has to be another (`utils.changes`).
    """

    def __init__(self, entry: Entry, name: str, tensors: dict[str, torch.Tensor], device: torch.device):
        self.source = entry, name
        self.embedded = entry.manifest.models[name].weights_sha256 is not None
        self._for_ranges = bool(entry.manifest.models[name].ranges)
        self._loader = build.loader(entry.path, name, -1 if device.index is None else device.index)
        self._outputs = pytree.treespec_loads(self._loader.get_call_spec()[1])
        # Kept, because the package knows their addresses alone.
        self._weights = {name: tensors[name].detach() for name in entry.manifest.models[name].bound}
        if self._weights:
            self._loader.load_constants(self._weights, False, True, True)  # all of them, and managed here

    def __call__(self, inputs: Inputs) -> Any:
        leaves = pytree.tree_leaves(inputs)
        if self._for_ranges:
            leaves = [tensor.contiguous() for tensor in leaves]
        return pytree.tree_unflatten(self._loader.boxed_run(leaves), self._outputs)


class PackagedRegion:
    """Stands in for a module's forward: a bound model for each kind of input, fetched at the first such call.

    A model for a range of sizes is bound once, and serves several kinds.
    """

    def __init__(self, region: Region, module: nn.Module, library: Library):
        self.region, self.module, self.packages = region, module, library
        self.original = module.forward
        self.processors = _processors(module)
        self.bound: dict[Key, BoundModel] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        inputs = self.region.arguments(args, kwargs)
        key = regions.key(inputs)
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in pytree.tree_leaves(inputs)):
            raise UserError("packages compute no gradients: use a recipe with execution=compile or eager")
        if self.packages.recorded is not None:
            self.packages.recorded.setdefault((self.region, key), (self, inputs))
            return self.original(**inputs)
        if key not in self.bound:
            self.bound[key] = self.packages.bind(self, inputs)
        return self.bound[key](inputs)

    @contextmanager
    def unpackaged(self) -> Iterator[nn.Module]:
        """The module as it was, for export to see."""
        around = self.module.forward  # this object, or what was put around it since
        self.module.forward = self.original
        try:
            yield self.module
        finally:
            self.module.forward = around


PackagedCall = tuple[PackagedRegion, Inputs]


@dataclass
class Library:
    """The packages of one pipeline.

    identity: what a package must be to fit. options: Inductor's, for packages that have to be built. checkpoint: what
    the pipeline was loaded from, as `--checkpoint` takes it. packaged: all that packages stand in for. recorded: while
    calls are recorded instead of packages run, the first one of each kind. last_call: of the transformer. coming: what
    was announced of the next call.
    """

    pipe: DiffusionPipeline
    recipe: Recipe
    identity: Identity
    options: dict[str, Any]
    store: PackageStore
    checkpoint: str
    packaged: list[PackagedRegion] = field(default_factory=list)
    recorded: dict[tuple[Region, Key], PackagedCall] | None = None
    last_call: TransformerCall | None = None
    coming: Sizes | None = None

    def __post_init__(self) -> None:
        self._whole: set[tuple[Path, str, tuple[int, ...]]] = set()  # files as they were checked, with their sha256

    def bind(self, region: PackagedRegion, inputs: Inputs) -> BoundModel:
        """The model for these inputs, with the region's weights; built first if it isn't there and may be built.

        Raises:
            UserError: there is none that fits, it is damaged, or the weights or the inputs' device aren't those it was
                compiled for.
        """
        device = self.pipe.transformer.device
        for name, value in inputs.items():
            elsewhere = [leaf.device for leaf in pytree.tree_leaves(value) if leaf.device != device]
            if elsewhere:
                raise UserError(f"packages here run on {device}: {name} comes on {elsewhere[0]}, move it there")
        found = self.find(region.region, inputs)
        if found is None:
            self.build_missing([(region, inputs)])
            found = self.find(region.region, inputs)
            assert found is not None
        known = [model for model in region.bound.values() if model.source == found]
        return known[0] if known else self.bound(region, *found, inputs)

    def bound(self, region: PackagedRegion, entry: Entry, name: str, inputs: Inputs) -> BoundModel:
        """A package's model with the region's weights, after all checks.

        Raises:
            UserError: the package was built for something else, it is damaged, or the weights aren't those that it
                was compiled for.
        """

        def command(folder: str | None = None) -> str:
            return build_command(self, region.region, inputs, folder)

        reason = entry.manifest.identity.refusal(self.identity, region.region.component)
        if reason is not None:
            raise UserError(f"{entry.path} {reason}: build one that fits with `{command()}`")
        file = entry.path, entry.beside.sha256, state(entry.path)
        if file not in self._whole:
            check_file(entry, f"delete it and {entry.path.stem}.json, and build it again with `{command()}`")
            self._whole.add(file)
            build.provide_kernels(entry.path)
        tensors = weights.exported_tensors(region.module)
        device = self.pipe.transformer.device
        model = entry.manifest.models[name]
        reason = weights.refusal(model, tensors, device) or self._other_inside(model, region.region)
        if reason is not None:
            raise UserError(
                f"{entry.path} {reason}: load a checkpoint of the architecture it was built for, or build one for "
                f"this in another folder with `{command('OTHER_FOLDER')}`"
            )
        self._refuse_changed(region)
        return BoundModel(entry, name, tensors, device)

    def _refuse_changed(self, region: PackagedRegion) -> None:
        """Raise UserError if a module would do otherwise than its package: it has got hooks inside, another attention,
        or a block beside it that isn't packaged."""
        name, instead = region.region.name, "or use a recipe with execution=compile"
        # These are called as modules, packages or not, and their hooks with them.
        outside = (region.module, getattr(region.module, "layer", None), self.pipe.transformer)
        for inside, part in region.module.named_modules():
            if part not in outside and (part._forward_hooks or part._forward_pre_hooks):
                raise UserError(
                    f"packages run no hooks of what is inside the {name}, and {inside} has some: remove them, {instead}"
                )
        if _processors(region.module) != region.processors:
            raise UserError(
                f"packages have the attention of the recipe, and the {name} has got another processor: give it back "
                f"its own, {instead}"
            )
        if region.region is regions.BEFORE:
            here = {module for of, module in regions.modules(self.pipe, self.recipe.compile_scope) if of.is_block}
            if here != {packaged.module for packaged in self.packaged if packaged.region.is_block}:
                raise UserError(f"packages are bound to the blocks that there were: put these back, {instead}")

    def unbind(self) -> None:
        """Bind every weight anew at the next call, after all checks.

        Embedded weights go at once: CUDA graphs of what was bound mustn't run any more (`when_changed` tells both).
        """
        for region in self.packaged:
            region.bound.clear()
            if isinstance(region.module, regions.Around):
                region.module.take_parts()

    def find(self, region: Region, inputs: Inputs) -> tuple[Entry, str] | None:
        """The package and the model for these inputs; None if there is none but it may be built.

        One of these very shapes goes before one for a range of sizes.

        Raises:
            UserError: there is none that fits, and none may be built.
        """
        wanted = build.input_specs(inputs)
        nearest, for_range = (0, ""), None
        for entry in self.store.entries():
            models = {name: model for name, model in entry.manifest.models.items() if model.region == region.name}
            if not models:
                continue
            other_inputs = {name: sizes.refusal(model, wanted) for name, model in models.items()}
            fitting = [name for name, why in other_inputs.items() if why is None]
            inside = (self._other_inside(models[name], region) for name in fitting)
            reason = entry.manifest.identity.refusal(self.identity, region.component) or next(
                filter(None, inside), None
            )
            if reason is None:
                for name in fitting:
                    if not models[name].ranges:
                        return entry, name
                    for_range = for_range or (entry, name)
            rank = 3 if reason is None else 2 if fitting else 1
            if rank > nearest[0]:
                nearest = rank, f" ({entry.path.name} {reason or next(iter(other_inputs.values()))})"
        if for_range is not None or self.store.build:
            return for_range
        damaged = [f" ({reason})" for reason in self.store.damaged()]
        raise UserError(
            f"no package in {self.store.folder} {in_words(self, region, inputs)}: {self.store.to_build}, or build one "
            f"with `{build_command(self, region, inputs)}`{(*damaged, nearest[1])[0]}"
        )

    def _other_inside(self, model: Model, region: Region) -> str | None:
        """Why a model isn't for this pipeline, of whose weights it holds others."""
        if model.weights_sha256 is None:
            return None
        module = next(packaged.module for packaged in self.packaged if packaged.region is region)
        found = weights.fingerprint(weights.exported_tensors(module))
        if found == model.weights_sha256:
            return None
        return f"holds weights with sha256 {model.weights_sha256[:12]}, the {model.region} here has {found[:12]}"

    def build_missing(self, calls: Sequence[PackagedCall]) -> None:
        """`build` in the middle of a call, which then takes a minute or more, and says why."""
        region, inputs = calls[0]
        why = f"no package in {self.store.folder} {in_words(self, region.region, inputs)}"
        tqdm.write(f"{why}: building one", file=sys.stderr)  # between progress bars
        self.build(calls)

    def build(
        self,
        calls: Collection[PackagedCall],
        embed_weights: bool = False,
        dynamic: bool = False,
        verified: bool = True,
    ) -> tuple[Entry, bool]:
        """One package with a model for each of these calls, and whether it was there already.

        dynamic: one for all those of a region that differ in their sizes alone, and for what lies between them; besides
        them where that is slower.
        verified: its models are run on the calls' modules, and it is there only if they compute what those do.

        Raises:
            UserError: a model for a range of sizes can't be had, or one doesn't compute what its module does.
        """
        each = [Call(region.region, region.module, inputs) for region, inputs in calls]
        planned = {call.name: call for call in (build.over_ranges(each) if dynamic else each)}
        with ExitStack() as stack:
            for region, _ in calls:
                stack.enter_context(region.unpackaged())
            models = build.planned(planned.values(), embed_weights)
            components = {call.region.component for call in planned.values()}
            name = f"{_kind(components)}-{content_key(self.identity, components, models)}"

            def make(path: Path) -> Manifest:
                checkpoint = checkpoints.public_name(self.checkpoint)
                manifest = build.build(path, self.identity, planned, models, self.options, checkpoint)
                if verified:
                    with cuda_kernel.used() as kernels:
                        self._refuse_wrong(not_yet_stored(path, manifest), self._first_and_last(calls))
                    build.add_kernels(path, kernels)
                return manifest

            return self.store.write(name, make, refusal)

    def _first_and_last(self, calls: Collection[PackagedCall]) -> list[PackagedRegion]:
        """What was called, and of each region the last module, with whose weights no model was compiled, unless it is
        the only one."""
        called = [region for region, _ in calls]
        last = {packaged.region: packaged for packaged in self.packaged}
        return [*called, *(last[region] for region in dict.fromkeys(one.region for one in called))]

    def _refuse_wrong(self, built: Entry, compiled: list[PackagedRegion]) -> None:
        """Raise UserError unless each model of a package computes what the modules do that it was compiled from."""
        wrong = [error for error in verify(built, self, compiled) if not error.ok]
        if wrong:
            raise UserError(
                f"no package was written, for what was compiled computes something else than the module: {wrong[0]}; "
                "use a recipe with execution=compile, and report it with PyTorch's version"
            )

    @contextmanager
    def recording(self) -> Iterator[dict[tuple[Region, Key], PackagedCall]]:
        """Run the modules as they were, and record how they are called: one call of each kind.

        Not for a pipeline with CUDA graphs: one captured meanwhile would go on running the modules as they were.
        """
        recorded: dict[tuple[Region, Key], PackagedCall] = {}
        self.recorded = recorded
        try:
            yield recorded
        finally:
            self.recorded = None


class PackagedTransformer:
    """Stands in for the transformer's forward: the denoising step, with `before` and `after` from packages.

    The blocks that it calls are from packages as well. Where something is missing and may be built, one eager call of a
    new kind shows what the regions are called with, and they are built into one package.
    """

    def __init__(self, library: Library, before: PackagedRegion, after: PackagedRegion):
        self.packages, self.before, self.after = library, before, after
        self.known: set[Key] = set()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        named = hoisting.by_name(args, kwargs)
        if self.packages.recorded is None and self.packages.store.build:
            key = regions.key({name: value for name, value in named.items() if regions.is_tensors(value)})
            if key not in self.known:
                self._build_what_is_missing(named)
                self.known.add(key)
        return self._run(named)

    def _build_what_is_missing(self, named: dict[str, Any]) -> None:
        with self.packages.recording() as calls:
            self._run(named)
        missing = [call for (region, _), call in calls.items() if self.packages.find(region, call[1]) is None]
        if missing:
            self.packages.build_missing(missing)

    def _run(self, named: dict[str, Any]) -> Any:
        return hoisting.run(self.packages.pipe.transformer, self.before, self.after, **named)


class WholeTransformer:
    """Stands in for the transformer's forward: the denoising step as one model."""

    def __init__(self, region: PackagedRegion):
        self.packages, self.region = region.packages, region

    def __call__(self, *args: Any, return_dict: bool = True, **kwargs: Any) -> Any:
        sample = self.region(**hoisting.by_name(args, kwargs))
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)


def attach(pipe: DiffusionPipeline, recipe: Recipe, options: dict[str, Any], packages: PackageStore) -> str:
    """Let packages do the work of `pipe.transformer`, `pipe.vae.decoder` and, where the recipe says so, of the text
    encoders' layers; the pipeline is called as before."""
    library = Library(pipe, recipe, identify(pipe, recipe), options, packages, checkpoints.name(pipe))

    def note(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        library.last_call = TransformerCall.of(args, kwargs, pipe.vae_scale_factor)

    pipe.transformer.register_forward_pre_hook(note, prepend=True, with_kwargs=True)  # before anything is hoisted
    for region, module in regions.modules(pipe, recipe.compile_scope):
        library.packaged.append(PackagedRegion(region, module, library))
        module.forward = library.packaged[-1]
        module.requires_grad_(False)
    decoders = [region.module for region in library.packaged if region.region is regions.DECODER]
    encoders = [pipe.text_encoder, pipe.text_encoder_2] if recipe.compiled_text_encoders else []
    for encoder in encoders:
        encoder.requires_grad_(False)
    for region, module, layer in text_encoders.layers(pipe) if encoders else ():
        library.packaged.append(packaged := PackagedRegion(region, module, library))
        layer.forward = text_encoders.PackagedLayer(region, packaged)
    for module in (pipe.transformer, *decoders, *encoders):
        when_changed(module, library.unbind)
    if recipe.compile_scope == "whole":
        pipe.transformer.forward = WholeTransformer(library.packaged[0])
        return f"torch.export + AOTInductor, transformer{' and VAE decoder' if decoders else ''}"
    before, after = (one for one in library.packaged if one.region in (regions.BEFORE, regions.AFTER))
    pipe.transformer.forward = PackagedTransformer(library, before, after)
    what = "the transformer's blocks, what surrounds them" + (", and the VAE's decoder" if decoders else "")
    return f"torch.export + AOTInductor, {what}"


def _processors(module: nn.Module) -> list[Any]:
    """Diffusers' attention processors in a module."""
    return [part.processor for part in module.modules() if hasattr(part, "processor")]


def _kind(components: Collection[str]) -> str:
    """What a package's file is called after."""
    if set(components) <= set(text_encoders.COMPONENTS):
        return "text_encoders"
    return regions.DECODER.name if set(components) == {regions.DECODER.component} else "transformer"


def announce(pipe: DiffusionPipeline, request: Request) -> None:
    """Tell of a call to come, so that what is refused before its sizes are seen can name them.

    Raises:
        UserError: no package has the decoder that the call would end with, and none may be built.
    """
    library = getattr(without_graph(pipe.transformer), "packages", None)
    if library is None:
        return
    library.coming = Sizes.of(request)
    vae = getattr(pipe, "vae", None)
    if vae is None or library.store.build:
        return
    sides = (request.height // pipe.vae_scale_factor, request.width // pipe.vae_scale_factor)
    sample = torch.empty(request.batch, vae.config.latent_channels, *sides, dtype=vae.dtype, device=vae.device)
    library.find(regions.DECODER, regions.DECODER.arguments((sample,), {}))


def library_of(pipe: DiffusionPipeline) -> Library:
    """The packages that `attach` gave a pipeline."""
    return without_graph(pipe.transformer).packages


def without_graph(module: nn.Module) -> Any:
    """A module's forward without the CUDA graph and the loop that may be around it."""
    forward = module.forward
    while hasattr(forward, "function"):
        forward = forward.function
    return forward


def runs_embedded_weights(pipe: DiffusionPipeline) -> bool:
    """Whether some of the pipeline's work is done with weights that a package holds, and not with its own."""
    library = getattr(without_graph(pipe.transformer), "packages", None)
    return library is not None and any(one.embedded for region in library.packaged for one in region.bound.values())
