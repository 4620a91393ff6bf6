"""A folder of packages, and what lists and looks at it, where some of what lies there can't be read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from export.checks import refusal
from export.manifest import Manifest
from export.store import PackageStore
from tests.denied import denied
from tests.export.test_hub import make_package
from utils.files import ForbiddenError


@pytest.fixture
def export(main: Callable) -> Callable:
    """export("list", ...): `python -m export list ...`, in this process."""
    return lambda *arguments: main("export.__main__", *arguments)


def test_manifest_nested_too_deep_is_in_nobodys_way(export: Callable, tmp_path: Path) -> None:
    package = make_package(tmp_path)
    (tmp_path / "aaa.pt2").write_bytes(b"")
    (tmp_path / "aaa.json").write_text("[" * 200_000)
    assert PackageStore(tmp_path).entries() == [package]
    done = export("list", tmp_path)
    assert done.out.startswith(f"{package.path}: ")
    assert f"{tmp_path}/aaa.json is damaged (maximum recursion depth exceeded" in done.error()
    assert "is damaged" in export("inspect", tmp_path / "aaa.pt2").error()


@pytest.mark.parametrize(("inputs", "words"), [({}, ""), ({"hidden_states": (1, 16, 256)}, "encodes 16 text tokens; ")])
def test_listed_whatever_inputs_a_region_has(export: Callable, tmp_path: Path, inputs: dict, words: str) -> None:
    package = make_package(tmp_path)
    beside = package.path.with_suffix(".json")
    changed = json.loads(beside.read_text())
    (model,) = changed["manifest"]["models"].values()
    model["region"] = "t5_layer"
    (spec,) = model["inputs"].values()
    model["inputs"] = {"scalar": {**spec, "shape": [], "stride": []}, **dict.fromkeys(inputs, spec)}
    beside.write_text(json.dumps(changed))
    done = export("list", tmp_path)
    assert done.code == 0, done.err
    assert done.out.startswith(f"{package.path}: {words}0.01 MB, ")


def test_packages_of_parts_say_what_they_are_for(export: Callable, tmp_path: Path) -> None:
    """As a call that builds what it lacks writes them."""
    for region in ("after", "clip_layer"):
        beside = make_package(tmp_path, region).path.with_suffix(".json")
        changed = json.loads(beside.read_text())
        (model,) = changed["manifest"]["models"].values()
        model["region"] = region
        (spec,) = model["inputs"].values()
        model["inputs"] = {"hidden_states": {**spec, "shape": [1, 24, 64], "stride": [1536, 64, 1]}}
        beside.write_text(json.dumps(changed))
    done = export("list", tmp_path)
    assert [line.partition(": ")[2].partition(";")[0] for line in done.out.splitlines()] == [
        "draws 24 image tokens",
        "encodes 24 text tokens",
    ]


@pytest.mark.parametrize("size", [0, 100])
def test_truncated_package_is_listed_as_damaged(export: Callable, tmp_path: Path, size: int) -> None:
    whole, truncated = make_package(tmp_path, "whole"), make_package(tmp_path, "truncated")
    content = truncated.path.read_bytes()
    truncated.path.write_bytes(content[:size])
    done = export("list", tmp_path)
    assert [line.partition(": ")[0] for line in done.out.splitlines()] == [str(whole.path)]
    assert done.error() == (
        f"error: {truncated.path} is damaged, for it has {size} bytes, its manifest says {len(content)}: delete it and "
        "truncated.json, and build it again (it came from `python -m export build --checkpoint tiny`)"
    )
    assert done.code == 1


@pytest.mark.parametrize(
    ("command", "what"),
    [("list", ""), ("list", "a.json"), ("inspect", ""), ("inspect", "a.json"), ("inspect", "a.pt2")],
)
def test_what_may_not_be_read_is_neither_missing_nor_damaged(
    export: Callable, shared: Path, command: str, what: str
) -> None:
    package = make_package(shared, "a")
    with denied(shared / what):
        line = export(command, shared if command == "list" else package.path).error()
    named = package.path if command == "inspect" and not what else shared / what
    assert line == (
        f"error: {named} may not be read by you (Permission denied): have its owner change its permissions (chmod), or "
        "choose another folder"
    )


def test_found_once_it_may_be_read(shared: Path) -> None:
    package, store = make_package(shared), PackageStore(shared)
    with denied(package.path.with_suffix(".json")):
        assert store.entries() == []
        (why,) = store.damaged()
        assert "may not be read" in why
    assert store.entries() == [package]


def never(path: Path) -> Manifest:
    raise AssertionError(f"{path} was made")


@pytest.mark.parametrize("suffix", [".pt2", ".json"])
def test_what_may_not_be_read_is_not_built_anew(shared: Path, suffix: str) -> None:
    package = make_package(shared, "a")
    (shared / ".a.lock").chmod(0o666)
    with denied(package.path.with_suffix(suffix)), pytest.raises(ForbiddenError, match=rf"a\{suffix} may not be read"):
        PackageStore(shared).write("a", never, refusal)


def test_lock_of_another_user(shared: Path) -> None:
    make_package(shared, "a")
    with denied(shared / ".a.lock"), pytest.raises(ForbiddenError, match=r"/\.a\.lock may not be written by you \("):
        PackageStore(shared).write("a", never, refusal)
