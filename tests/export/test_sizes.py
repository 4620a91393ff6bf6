"""Models for a range of sizes: they compute what the eager modules do at any size in it, and are refused outside."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from torch import nn

import recipes
from export import build, order, regions, sizes
from export.build import Call
from export.manifest import Model, Range, TensorSpec
from export.order import Order
from export.runtime import Library, PackagedRegion, library_of
from export.store import Entry, PackageStore
from export.verify import verify
from recipes import Recipe
from tests.export.conftest import AOTI, CPU, forge, inputs_of_after
from utils.compile_clock import CompileClock
from utils.errors import UserError


def block_inputs(
    batch: int = 1, image: int = 12, text: int = 8, dtype: torch.dtype = torch.float32, seed: int = 0
) -> dict[str, Any]:
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random).to(dtype)

    return {
        "hidden_states": normal(batch, image, 256),
        "encoder_hidden_states": normal(batch, text, 256),
        "temb": normal(batch, 256),
        "image_rotary_emb": tuple(torch.randn(text + image, 128, generator=random) for _ in range(2)),
    }


def of_block(**given: Any) -> dict[str, TensorSpec]:
    return build.input_specs(block_inputs(**given))


def model(ranges: dict[str, Range], **given: Any) -> Model:
    return Model("double_block", of_block(**given), ranges, {}, (), None)


TOKENS = {"image_tokens": Range(4, 20), "text_tokens": Range(2, 8)}


@pytest.mark.parametrize(("image", "text"), [(4, 2), (20, 8), (13, 7), (12, 8)])
def test_sizes_within_the_ranges_are_taken(image: int, text: int) -> None:
    assert sizes.refusal(model(TOKENS), of_block(image=image, text=text)) is None


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"image": 21}, "takes 4 to 20 image tokens, it comes with 21"),
        ({"image": 3}, "takes 4 to 20 image tokens, it comes with 3"),
        ({"text": 9}, "takes 2 to 8 text tokens, it comes with 9"),
        ({"batch": 2}, "takes hidden_states float32[1, 12, 256], it comes float32[2, 12"),
        ({"dtype": torch.bfloat16}, "takes hidden_states float32[1, 12, 256], it comes bf"),
    ],
)
def test_other_inputs_are_refused(given: dict[str, Any], words: str) -> None:
    assert (sizes.refusal(model(TOKENS), of_block(**given)) or "").startswith(words)


def test_inputs_that_disagree_about_a_size_are_refused() -> None:
    """The model would read beyond the shorter one."""
    wanted = {**of_block(image=16), "image_rotary_emb.0": of_block(image=12)["image_rotary_emb.0"]}
    reason = "takes image_rotary_emb.0 float32[24, 128], it comes float32[20, 128]"
    assert (sizes.refusal(model(TOKENS), wanted) or "").startswith(reason)
    without = {name: spec for name, spec in of_block().items() if name != "temb"}
    assert (sizes.refusal(model(TOKENS), without) or "").endswith("it comes not at all")


def test_a_size_that_is_the_same_in_all_calls_stays_fixed() -> None:
    ranges = {"image_tokens": Range(4, 20)}
    assert sizes.ranges([of_block(image=20), of_block(image=4), of_block(image=9)]) == ranges
    assert sizes.refusal(model(ranges), of_block(image=5)) is None
    reason = sizes.refusal(model(ranges), of_block(image=5, text=7)) or ""
    assert reason.startswith("takes encoder_hidden_states float32[1, 8, 256]")


def test_without_ranges_the_strides_count() -> None:
    spec = of_block(batch=2)
    view = {**spec, "hidden_states": replace(spec["hidden_states"], stride=(5120, 256, 1))}
    assert "[5120, 256, 1]" in (sizes.refusal(model({}, batch=2), view) or "")
    assert sizes.refusal(model(TOKENS, batch=2), view) is None, "made contiguous before the call"


def after_calls(*given: dict[str, int]) -> list[Call]:
    return [Call(regions.AFTER, nn.Identity(), inputs_of_after(**one)) for one in given]


def test_calls_that_differ_in_more_than_size_stay_apart() -> None:
    calls = after_calls({"tokens": 16}, {"tokens": 40}, {"tokens": 24, "batch": 2}, {"tokens": 24})
    one, other = build.over_ranges(calls)
    assert one.ranges == {"image_tokens": Range(16, 40)}
    assert one.inputs["hidden_states"].shape == (1, 40, 256)
    assert (other.ranges, other.inputs["hidden_states"].shape) == ({}, (2, 24, 256))
    assert other.name == calls[2].name, "the model is that of a package of fixed shapes"
    assert one.name not in {call.name for call in calls}


def test_a_region_that_is_slower_over_ranges_keeps_the_sizes_ordered() -> None:
    samples = [torch.zeros(1, 16, height, 8) for height in (6, 10, 8)]
    calls = [Call(regions.DECODER, nn.Identity(), {"sample": sample}) for sample in samples]
    ranging, *fixed = build.over_ranges(calls)
    assert ranging.ranges == {"latent_height": Range(6, 10)}
    assert [call.name for call in fixed] == [call.name for call in calls]
    assert build.over_ranges(calls[:1]) == calls[:1], "of one size there is no range"


def test_a_range_from_one_on_is_refused() -> None:
    with pytest.raises(UserError, match="no model takes 1 to 16 image tokens: order sizes from 2 on"):
        build.over_ranges(after_calls({"tokens": 1}, {"tokens": 16}))


class Halving(nn.Module):
    """Asks of its sizes what holds of every other."""

    def forward(self, hidden_states: torch.Tensor, temb: torch.Tensor) -> torch.Tensor:
        even = hidden_states.shape[1] % 2 == 0
        return hidden_states[:, ::2] if even else hidden_states


@pytest.mark.parametrize("part", ["module", "compiler"])
def test_what_holds_of_some_sizes_only_is_refused(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Code of one size's own would be run on all: a package's model doesn't ask."""
    module: nn.Module = Halving()
    if part == "compiler":
        module = nn.Identity()
        monkeypatch.setattr(torch._inductor, "aot_compile", relying_on_even_sizes)
        monkeypatch.setattr(nn.Identity, "forward", lambda self, hidden_states, temb: hidden_states + 1)
    (call,) = build.over_ranges([replace(one, module=module) for one in after_calls({"tokens": 16}, {"tokens": 40})])
    with pytest.raises(UserError, match=r"after can't be compiled for 16 to 40 image tokens .*build it without --dy"):
        build.compile_call(call, {}, False)


def relying_on_even_sizes(graph: torch.fx.GraphModule, *arguments: Any, **options: Any) -> list:
    tokens = graph.graph.find_nodes(op="placeholder")[0].meta["val"].shape[1]
    assert tokens % 2 == 0
    return []


@pytest.fixture(scope="module")
def ordered(tmp_path_factory: pytest.TempPathFactory) -> Entry:
    """The package of tiny in float32 from 48x64 to 80x64 and from 32 to 64 text tokens."""
    wanted = Order("tiny", AOTI, ((48, 64), (80, 64)), batches=(1,), text_lengths=(32, 64), dynamic=True)
    ((entry, was_there),) = order.fill(wanted, tmp_path_factory.mktemp("ranges"), CPU)
    assert not was_there
    return entry


@pytest.fixture(scope="module")
def ranging(tiny: Callable, ordered: Entry) -> DiffusionPipeline:
    """A pipeline that runs from that package and may build nothing."""
    pipe = tiny()
    recipes.apply(pipe, AOTI, PackageStore(ordered.path.parent, build=False))
    return pipe


@pytest.mark.slow
def test_one_model_a_region(ordered: Entry) -> None:
    models = ordered.manifest.models.values()
    tokens, text = {"image_tokens": Range(12, 20)}, {"text_tokens": Range(32, 64)}
    assert {one.region: one.ranges for one in models if one.ranges} == {
        "before": tokens | text,
        "double_block": tokens | text,
        "single_block": tokens | text,
        "after": tokens,
        "vae_decoder": {"latent_height": Range(6, 10)},
    }
    fixed = [one for one in models if not one.ranges]
    assert [(one.region, one.inputs["sample"].shape[2]) for one in fixed] == [("vae_decoder", 6), ("vae_decoder", 10)]
    assert len(models) == 5 + len(fixed)


@pytest.mark.slow
@pytest.mark.parametrize(("height", "text"), [(64, 48), (80, 33), (48, 64)])
def test_sizes_between_are_drawn_as_eager_draws_them(
    tiny: Callable, draw: Callable, ranging: DiffusionPipeline, height: int, text: int
) -> None:
    with CompileClock() as clock:
        got = draw(ranging, height=height, steps=2, max_sequence_length=text)
    assert clock.compilations == 0
    expected = draw(tiny(), height=height, steps=2, max_sequence_length=text)
    np.testing.assert_allclose(got, expected, atol=1e-3)
    for region in library_of(ranging).packaged:
        bound = list({id(one): one for one in region.bound.values()}.values())
        if region.region is not regions.DECODER:
            assert len(bound) <= 1, "one model, bound once"
            continue
        for ((_, (shape, *_)),), one in region.bound.items():
            entry, name = one.source
            assert bool(entry.manifest.models[name].ranges) == (shape[2] not in (6, 10)), (
                "of those ordered each has one"
            )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "words", "resolution"),
    [
        ({"height": 96}, "takes 12 to 20 image tokens, it comes with 24", "96x64"),
        ({"height": 32}, "takes 12 to 20 image tokens, it comes with 8", "32x64"),
        ({"max_sequence_length": 16}, "takes 32 to 64 text tokens, it comes with 16", "64x64"),
        ({"width": 32, "height": 96}, "takes 6 to 10 latent height, it comes with 12", "96x32"),
        ({"batch": 2}, "takes hidden_states float32[1, 16, 64], it comes", "64x64"),
    ],
    ids=["large", "small", "text", "decoder", "batch"],
)
def test_sizes_outside_are_refused_before_any_code_is_loaded(
    draw: Callable,
    ordered: Entry,
    tiny: Callable,
    monkeypatch: pytest.MonkeyPatch,
    size: dict,
    words: str,
    resolution: str,
) -> None:
    pipe = tiny()
    recipes.apply(pipe, AOTI, PackageStore(ordered.path.parent, build=False))
    loaded: list[str] = []
    load = build.loader
    monkeypatch.setattr(build, "loader", lambda path, name, device: (loaded.append(name), load(path, name, device))[1])
    with pytest.raises(UserError) as raised:
        draw(pipe, **size)
    (line,) = str(raised.value).splitlines()
    assert f"({ordered.path.name} {words}" in line
    assert f"--resolutions {resolution}" in line
    assert "python -m export build --checkpoint tiny --recipe fp32,execution=aoti" in line
    refused = "vae_decoder" if "latent" in words else "before"
    assert not [name for name in loaded if name.startswith(refused)]


def after_of(library: Library) -> PackagedRegion:
    (found,) = [region for region in library.packaged if region.region is regions.AFTER]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("first", ["fixed", "dynamic"])
def test_the_model_of_just_that_size_goes_first(
    library: Library, package: Entry, ordered: Entry, tmp_path: Path, first: str
) -> None:
    for entry, name in ((package, "fixed"), (ordered, "dynamic")):
        for suffix in (".pt2", ".json"):
            shutil.copy(entry.path.with_suffix(suffix), tmp_path / f"{'a' if name == first else 'b'}-{name}{suffix}")
    both = replace(library, store=PackageStore(tmp_path, build=False))
    region = after_of(library)
    for tokens, expected in ((16, "fixed"), (17, "dynamic")):
        found = both.find(region.region, inputs_of_after(tokens=tokens))
        assert found is not None
        assert found[0].path.stem.endswith(expected)


@pytest.fixture
def forged(ordered: Entry, tmp_path: Path) -> Path:
    for file in (ordered.path, ordered.path.with_suffix(".json")):
        shutil.copy(file, tmp_path / file.name)
    return tmp_path / ordered.path.name


def refused(library: Library, folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The one line with which a folder's package is refused for 16 tokens, its code being left alone."""

    def loaded(*arguments: Any) -> None:
        raise AssertionError("the package's code was loaded")

    monkeypatch.setattr(build, "loader", loaded)
    with pytest.raises(UserError) as raised:
        replace(library, store=PackageStore(folder, build=False)).bind(after_of(library), inputs_of_after())
    (line,) = str(raised.value).splitlines()
    return line


def of_after(manifest: dict[str, Any]) -> dict[str, Any]:
    return next(one for one in manifest["models"].values() if one["region"] == "after")


CHANGES: dict[str, Callable[[dict[str, Any]], object]] = {
    "smallest": lambda one: one["ranges"]["image_tokens"].update(smallest=2),
    "largest": lambda one: one["ranges"]["image_tokens"].update(largest=4096),
    "type": lambda one: one["ranges"]["image_tokens"].update(largest="20"),
    "part": lambda one: one["ranges"]["image_tokens"].pop("largest"),
    "unknown": lambda one: one["ranges"]["image_tokens"].update(step=16),
    "name": lambda one: one["ranges"].update(tokens=one["ranges"].pop("image_tokens")),
    "none": lambda one: one.update(ranges={}),
    "gone": lambda one: one.pop("ranges"),
    "other": lambda one: one.update(ranges=[12, 20]),
}


@pytest.mark.slow
@pytest.mark.parametrize("change", CHANGES)
def test_damaged_ranges_beside(library: Library, forged: Path, change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    beside = forged.with_suffix(".json")
    document = json.loads(beside.read_text())
    CHANGES[change](of_after(document["manifest"]))
    beside.write_text(json.dumps(document))
    assert "build" in refused(library, forged.parent, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda one: one["ranges"]["image_tokens"].update(largest=15), "takes 12 to 15 image tokens, it comes with 16"),
        (lambda one: one["ranges"]["image_tokens"].update(smallest=30), "no sizes are from 30 to 20"),
        (lambda one: one["ranges"].update(lines={"smallest": 1, "largest": 9}), "takes 1 to 9 lines, it comes with no"),
        (lambda one: one["ranges"].update(text_tokens={"smallest": 1, "largest": 9}), "takes 1 to 9 text tokens, it"),
        (lambda one: one["inputs"]["hidden_states"].update(shape=[1]), "no tensor is float32[1] with strides"),
        (lambda one: one["inputs"]["hidden_states"].update(shape=[2, 20, 256]), "takes hidden_states float32[2, 16, "),
        (lambda one: one.update(ranges={}), "takes hidden_states float32[1, 20, 256]"),
    ],
)
def test_package_of_other_ranges(
    library: Library, forged: Path, change: Callable, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    forge(forged, lambda manifest: change(of_after(manifest)))
    assert words in refused(library, forged.parent, monkeypatch)


@pytest.mark.slow
def test_verify_and_inspect(main: Callable, ordered: Entry) -> None:
    done = main("export.__main__", "verify", ordered.path)
    assert done.code == 0, done.err
    assert done.out.count(": ok, relative error") == 7
    told = main("export.__main__", "inspect", ordered.path).out
    assert "4 of 4 weights bound when loaded, 12 to 20 image tokens\n" in told


@pytest.mark.slow
def test_second_build_finds_the_first(main: Callable, ordered: Entry) -> None:
    size = ("--resolutions", "80x64,48x64", "--text-lengths", "32,64", "--dynamic", "--out", ordered.path.parent)
    done = main("export.__main__", "build", "--checkpoint", "tiny", "--recipe", "fp32,execution=aoti", *size)
    assert done.out.endswith("was there already\n"), done.err


@pytest.mark.slow
@pytest.mark.parametrize(
    "recipe", [AOTI, Recipe(execution="aoti", dtype="bfloat16", fused_qkv=True, quantization="float8_per_row")]
)
def test_single_block_of_two_images(tiny: Callable, tmp_path: Path, recipe: Recipe) -> None:
    """Its inputs come as views of one tensor, whose strides torch.export would take for fixed; and in float8."""
    dtype = getattr(torch, recipe.dtype)
    pipe = tiny(dtype)
    recipes.apply(pipe, recipe, PackageStore(tmp_path))
    library = library_of(pipe)
    single = next(region for region in library.packaged if region.region is regions.SINGLE_BLOCK)

    def call(image: int, text: int) -> dict[str, Any]:
        return single.region.arguments((), block_inputs(batch=2, image=image, text=text, dtype=dtype))

    entry, _ = library.build([(single, call(*tokens)) for tokens in ((6, 4), (20, 4), (20, 12))], dynamic=True)
    library.store.build = False
    assert all(error.ok for error in verify(entry, library))
    for tokens in ((6, 4), (7, 11), (20, 12)):
        inputs = call(*tokens)
        assert not inputs["hidden_states"].is_contiguous()
        with single.unpackaged() as module:
            expected = module(**inputs)
        torch.testing.assert_close(single(**inputs), expected, atol=0.1 if dtype is torch.bfloat16 else 1e-4, rtol=1e-2)
    with pytest.raises(UserError, match="takes 6 to 20 image tokens, it comes with 21"):
        single(**call(21, 4))
