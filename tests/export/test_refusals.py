"""A package that is damaged, or fits something else, is refused in one line before any of its code is loaded."""

from __future__ import annotations

import functools
import json
import random
import re
import zipfile
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from export import build
from export.manifest import Identity, content_key
from export.runtime import Library, PackagedRegion
from export.store import Entry, PackageStore, of_file
from export.verify import verify
from tests.export.conftest import agree, forge, inputs_of_after
from utils.errors import UserError

pytestmark = pytest.mark.slow  # the package is compiled first


@pytest.fixture
def refuse(library: Library, after: PackagedRegion, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """refuse(folder): the one line with which a folder's package is refused, its code being left alone."""

    def loaded(*arguments: Any) -> None:
        raise AssertionError("the package's code was loaded")

    def call(folder: Path, region: PackagedRegion = after, **inputs: torch.Tensor) -> str:
        fresh = replace(library, store=PackageStore(folder, build=False))
        with monkeypatch.context() as patch, pytest.raises(UserError) as raised:
            patch.setattr(build, "loader", loaded)
            fresh.bind(region, inputs or inputs_of_after())
        (line,) = str(raised.value).splitlines()
        assert "python -m export build" in line or "build the package again" in line
        return line

    return call


def test_the_package_itself_is_taken(library: Library, after: PackagedRegion, damaged: Path) -> None:
    forge(damaged, lambda manifest: None)
    fresh = replace(library, store=PackageStore(damaged.parent, build=False))
    inputs = inputs_of_after()
    with after.unpackaged() as module:
        expected = module(**inputs)
    torch.testing.assert_close(fresh.bind(after, inputs)(inputs), expected, atol=1e-5, rtol=1e-4)


def test_a_file_that_changes_while_it_is_in_use(
    library: Library, after: PackagedRegion, damaged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh = replace(library, store=PackageStore(damaged.parent, build=False))
    bind = functools.partial(fresh.bind, after, inputs_of_after())
    assert bind()(inputs_of_after()).shape == (1, 16, 64)
    monkeypatch.setattr(build, "loader", None)  # none of the new file's code is loaded
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:2000] + bytes([whole[2000] ^ 1]) + whole[2001:])
    with pytest.raises(UserError, match="has sha256"):
        bind()
    with zipfile.ZipFile(damaged, "w") as archive:
        archive.writestr("package/other", b"")
    with pytest.raises(UserError, match="bytes, its manifest says"):
        bind()


def test_any_damaged_byte_of_the_package(refuse: Callable, damaged: Path) -> None:
    content = damaged.read_bytes()
    rng = random.Random(0)
    for place in (0, len(content) - 1, *rng.sample(range(len(content)), 20)):
        damaged.write_bytes(content[:place] + bytes([content[place] ^ (1 << rng.randrange(8))]) + content[place + 1 :])
        assert "has sha256" in refuse(damaged.parent)


@pytest.mark.parametrize("part", [0, 0.5, 0.999])
def test_truncated_package(refuse: Callable, damaged: Path, part: float) -> None:
    content = damaged.read_bytes()
    damaged.write_bytes(content[: int(part * len(content))])
    line = refuse(damaged.parent)
    assert f"has {int(part * len(content))} bytes, its manifest says {len(content)}" in line
    beside = json.loads(damaged.with_suffix(".json").read_text())
    agree(damaged, beside)
    assert "is no whole package" in refuse(damaged.parent)


def test_record_damaged_before_the_hash_was_taken(refuse: Callable, damaged: Path, package: Entry) -> None:
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 255
    damaged.write_bytes(content)
    agree(damaged, json.loads(damaged.with_suffix(".json").read_text()))
    assert "is no whole package" in refuse(damaged.parent)


def test_any_damaged_byte_of_the_manifest(refuse: Callable, damaged: Path) -> None:
    beside = damaged.with_suffix(".json")
    content = beside.read_bytes()
    rng = random.Random(1)
    for place in rng.sample(range(len(content)), 60):
        beside.write_bytes(content[:place] + bytes([content[place] ^ (1 << rng.randrange(7))]) + content[place + 1 :])
        refuse(damaged.parent)


def leaves(value: Any, path: tuple = ()) -> list[tuple]:
    """The paths of all values in a JSON document."""
    members = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    inner = [leaf for name, member in members for leaf in leaves(member, (*path, name))]
    return inner or [path]


def other(value: Any) -> Any:
    """Another value of the same type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + 1
    return f"{value}x" if isinstance(value, str) else "something" if value is None else [*value, 1]


def put(document: Any, path: tuple, value: Any) -> None:
    *owners, last = path
    for name in owners:
        document = document[name]
    document[last] = value


def get(document: Any, path: tuple) -> Any:
    for name in path:
        document = document[name]
    return document


def test_every_field_of_the_manifest_beside(refuse: Callable, damaged: Path) -> None:
    """One of each kind: of the tensors, a few of their many."""
    beside = damaged.with_suffix(".json")
    text = beside.read_text()
    document = json.loads(text)
    kinds: dict[tuple, list[tuple]] = {}
    for path in leaves(document):
        kinds.setdefault(tuple("*" if isinstance(n, int) or "." in n or "-" in n else n for n in path), []).append(path)
    paths = [path for of_kind in kinds.values() for path in of_kind[:2]]
    assert len(paths) > 60
    for path in paths:
        changed = json.loads(text)
        put(changed, path, other(get(changed, path)))
        beside.write_text(json.dumps(changed))
        refuse(damaged.parent)
        changed = json.loads(text)
        put(changed, path, {"another": "type"})
        beside.write_text(json.dumps(changed))
        refuse(damaged.parent)
        changed = json.loads(text)
        del get(changed, path[:-1])[path[-1]]
        beside.write_text(json.dumps(changed))
        refuse(damaged.parent)


OF_OTHERS = ("transformers", "torchao")  # of text encoders and of quantized weights, which this package has none of
IDENTITY = [field.name for field in fields(Identity) if field.name not in ("architecture", "recipe", *OF_OTHERS)]


@pytest.mark.parametrize("name", IDENTITY)
def test_package_of_another_machine_or_version(refuse: Callable, damaged: Path, name: str, library: Library) -> None:
    forge(damaged, lambda manifest: manifest["identity"].update({name: "other-1"}))
    here = getattr(library.identity, name)
    what = "other sources of this repository" if name == "sources" else name
    assert f"was built for {what} other-1, this is {'null' if here is None else here[:40]}" in refuse(damaged.parent)


@pytest.mark.parametrize("name", OF_OTHERS)
def test_versions_that_shape_none_of_its_graphs_do_not_count(
    damaged: Path, name: str, library: Library, after: PackagedRegion
) -> None:
    forge(damaged, lambda manifest: manifest["identity"].update({name: "other-1"}))
    fresh = replace(library, store=PackageStore(damaged.parent, build=False))
    assert fresh.find(after.region, inputs_of_after()) is not None


def test_package_of_another_architecture(refuse: Callable, damaged: Path) -> None:
    forge(damaged, lambda manifest: manifest["identity"]["architecture"]["transformer"].update(num_attention_heads=24))
    assert "was built for a transformer with num_attention_heads=24, this one has 2" in refuse(damaged.parent)


def test_package_of_another_recipe(refuse: Callable, damaged: Path, library: Library, after: PackagedRegion) -> None:
    of_decoder = {"channels_last": True, "fused_group_norm": True, "vae_attention": "gemm"}
    of_graphs = {"cuda_graph": True, "scheduler_sync_removal": True, "loop_graph": True, "hook_search_removal": True}
    of_graphs |= {"early_preparation": True}
    forge(damaged, lambda manifest: manifest["identity"]["recipe"].update(of_graphs))
    fresh = replace(library, store=PackageStore(damaged.parent, build=False))
    assert fresh.find(after.region, inputs_of_after()) is not None, "these fields shape no graph"
    forge(damaged, lambda manifest: manifest["identity"]["recipe"].update(of_decoder))
    assert fresh.find(after.region, inputs_of_after()) is not None, "these fields shape the decoder's graph alone"
    forge(damaged, lambda manifest: manifest["identity"]["recipe"].update(fused_qkv=True))
    assert "was built for fused_qkv=true, the recipe here has false" in refuse(damaged.parent)
    forge(damaged, lambda manifest: manifest["identity"]["recipe"].pop("fused_qkv"))
    assert "was built for fused_qkv=null, the recipe here has false" in refuse(damaged.parent)


def test_what_shapes_a_components_graph(library: Library) -> None:
    """What doesn't, takes the same package: no one waits for a compiler for its sake."""

    def with_(**changes: Any) -> Identity:
        return replace(library.identity, recipe={**library.identity.recipe, **changes})

    here = with_(modulation="hoisted")
    offloaded, rounded, float8 = (
        with_(**{"modulation": "hoisted", **changes})
        for changes in (
            {"modulation": "offloaded"},
            {"device_postprocessing": True},
            {"quantization": "float8_per_row"},
        )
    )
    other_packages = replace(float8, torchao="0.1", cudnn_frontend="1.0", flash_attention="3.0")
    for component in ("transformer", "vae"):
        for same in (offloaded, rounded):
            assert same.refusal(here, component) is None
            assert content_key(same, {component}, {}) == content_key(here, {component}, {})
    assert other_packages.refusal(here, "vae") is None
    assert content_key(other_packages, {"vae"}, {}) == content_key(here, {"vae"}, {})
    assert other_packages.refusal(here, "transformer") is not None
    assert content_key(float8, {"transformer"}, {}) != content_key(here, {"transformer"}, {})
    both = {"vae", "transformer"}
    assert content_key(float8, both, {}) != content_key(here, both, {})


@pytest.mark.parametrize("inputs", [{"batch": 2}, {"tokens": 24}])
def test_other_shapes(refuse: Callable, package: Entry, inputs: dict[str, int]) -> None:
    line = refuse(package.path.parent, **inputs_of_after(**inputs))
    assert re.search(r"takes hidden_states float32\[1, 16, 256\], it comes float32\[", line)


def test_other_dtype_and_other_inputs(refuse: Callable, package: Entry) -> None:
    inputs = inputs_of_after()
    assert "it comes bfloat16" in refuse(package.path.parent, **{**inputs, "temb": inputs["temb"].bfloat16()})
    assert "it comes not at all" in refuse(package.path.parent, hidden_states=inputs["hidden_states"])


WEIGHT = torch.nn.Parameter(torch.zeros(64, 256), requires_grad=False)


@pytest.mark.parametrize(
    ("weight", "words"),
    [
        (WEIGHT[:32], r"wants the weight proj_out.weight as float32\[64, 256\] .*, here it is float32\[32, 256\]"),
        (WEIGHT.double(), r"as float32\[64, 256\] .*, here it is float64\[64, 256\]"),
        (WEIGHT.t().contiguous().t(), r"with strides \[256, 1\], here it is .* with strides \[1, 64\]"),
        (WEIGHT.to("meta"), r"wants the weight proj_out.weight on cpu, here it is on meta"),
        (None, r"wants the weight proj_out.weight, which the after here lacks \(1 missing\)"),
    ],
    ids=["shape", "dtype", "stride", "device", "missing"],
)
def test_wrong_weight(
    refuse: Callable, package: Entry, after: PackagedRegion, weight: torch.Tensor | None, words: str
) -> None:
    layer = after.module.proj_out
    kept = layer.weight
    layer.weight = None if weight is None else torch.nn.Parameter(weight, requires_grad=False)
    try:
        assert re.search(words, refuse(package.path.parent))
    finally:
        layer.weight = kept


def test_extra_weight(refuse: Callable, package: Entry, after: PackagedRegion) -> None:
    after.module.register_buffer("lora_A", torch.zeros(1))
    try:
        assert "has no weight lora_A, which the after here has" in refuse(package.path.parent)
    finally:
        del after.module.lora_A


def test_damaged_package_is_not_built_again_in_silence(
    library: Library, after: PackagedRegion, damaged: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fresh = replace(library, store=PackageStore(damaged.parent, build=True))
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:-10])
    with pytest.raises(UserError, match="delete it and"):
        fresh.bind(after, inputs_of_after())
    damaged.write_bytes(whole)
    damaged.with_suffix(".json").write_text("{")
    fresh.bind(after, inputs_of_after())  # by a package of its own
    assert "has the region after for hidden_states" in capsys.readouterr().err


def test_verify_refuses_a_package_of_something_else(library: Library, damaged: Path) -> None:
    forge(damaged, lambda manifest: manifest["identity"].update(torch="2.0.0"))
    with pytest.raises(UserError, match=r"was built for torch 2\.0\.0, this is "):
        verify(of_file(damaged), library)
