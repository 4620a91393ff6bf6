"""python -m export: build, list, inspect, verify, doctor."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from export import order
from export.card import card
from export.runtime import Library, PackagedRegion
from export.store import Entry, PackageStore
from recipes import Recipe
from tests.export.conftest import forge, inputs_of_after
from utils import checkpoints
from utils.errors import UserError
from utils.files import ROOT


@pytest.fixture
def export(main: Callable) -> Callable:
    """export("list", ...): `python -m export list ...`, in this process."""
    return lambda *arguments: main("export.__main__", *arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--recipe", "bf16"), "packages are for recipes with execution=aoti"),
        (("--resolutions", "64"), "give HEIGHTxWIDTH, as in 1024x1024,768x1344"),
        (("--resolutions", "60x64"), "--height 60 is not a positive multiple of 16: try 48 or 64"),
        (("--batch", "0"), "--batch 0: give positive whole numbers"),
        (("--text-lengths", "64,many"), "--text-lengths 64,many: give positive whole numbers"),
        (("--text-lengths", "64,100000"), "--text-lengths 100000: give 1 to 512, FLUX takes no more"),
        (("--out", "README.md"), "README.md is not a folder: choose another one"),
        (("--out", "README.md/new"), "README.md is not a folder: choose another one"),
        (("--out", "/proc/new"), "the folder /proc is not writable: choose another one"),
        (("--embed-weights",), "add compile_scope=whole to the recipe"),
        (("--dynamic",), "--dynamic: give the smallest and the largest size"),
    ],
)
def test_build_asked_for_the_impossible(
    export: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple, message: str
) -> None:
    """Told in one line before any weight is loaded."""

    def loaded(*arguments: object, **options: object) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(checkpoints, "load", loaded)
    done = export("build", "--checkpoint", "tiny", "--recipe", "aoti", "--out", tmp_path / "new", *arguments)
    assert message in done.error()
    assert len(done.lines) == 1
    assert done.code == 2
    assert not (tmp_path / "new").exists()


def test_no_packages(export: Callable, tmp_path: Path) -> None:
    assert "make one with `python -m export build`" in export("list", tmp_path).error()
    missing = export("inspect", tmp_path / "a.pt2")
    assert "a.pt2 is not there: give a package's .pt2 file" in missing.error()
    assert missing.code == 2


@pytest.mark.slow
def test_second_build_finds_the_first(export: Callable, package: Entry) -> None:
    before = package.path.stat().st_mtime_ns
    size = ("--resolutions", "64x64", "--text-lengths", 64, "--out", package.path.parent)
    done = export("build", "--checkpoint", "tiny", "--recipe", "fp32,execution=aoti", *size)
    assert done.code == 0, done.err
    assert package.path.name in done.out
    assert done.out.endswith("was there already\n")
    assert package.path.stat().st_mtime_ns == before


@pytest.mark.slow
def test_list_inspect_verify(export: Callable, package: Entry) -> None:
    (line,) = export("list", package.path.parent).out.splitlines()
    assert line.startswith(f"{package.path}: ")
    assert "fp32,execution=aoti, cpu" in line
    seen = export("inspect", package.path).out
    for words in (package.beside.sha256, "num_layers=2", "torch 2.", "106 of 106 weights bound", "float32[1, 16, 256]"):
        assert words in seen
    done = export("verify", package.path)
    assert done.code == 0, done.err
    assert [line.partition("-")[0] for line in done.out.splitlines()] == [
        *("before", "double_block", "single_block", "after", "vae_decoder")
    ]
    assert all(": ok, relative error " in line for line in done.out.splitlines())


@pytest.mark.slow
def test_verify_finds_code_that_computes_something_else(export: Callable, damaged: Path) -> None:
    """Two regions with the same inputs, and a manifest that takes one's weights for the other's name."""

    def change(manifest: dict) -> None:
        (name,) = [name for name in manifest["models"] if name.startswith("after-")]
        manifest["models"][name]["bound"].remove("proj_out.bias")

    forge(damaged, change)
    assert export("verify", damaged).code == 1


@pytest.mark.slow
def test_damaged_file(export: Callable, damaged: Path) -> None:
    damaged.write_bytes(damaged.read_bytes()[:-1])
    for command in ("inspect", "verify"):
        done = export(command, damaged)
        assert "bytes, its manifest says" in done.error()
        assert done.code == 1


@pytest.mark.slow
def test_doctor_where_all_is_well(export: Callable) -> None:
    done = export("doctor")
    assert done.code == 0, done.out
    assert done.out.splitlines()[-1] == "ok    a package of one layer: exported, compiled, loaded, run, and right"
    assert "WRONG" not in done.out


@pytest.mark.slow
def test_doctor_finds_a_compiler_that_links_its_library_statically(
    export: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = tmp_path / "g++"
    compiler.write_text('#!/bin/sh\nexec /usr/bin/env g++ -static-libstdc++ "$@"\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    done = export("doctor")
    assert "links libstdc++ statically, and every package crashes" in done.error()
    assert done.code == 1


def test_doctor_without_a_compiler(export: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", str(tmp_path / "none"))
    assert f"{tmp_path / 'none'} is not there; apt-get install g++" in export("doctor").error()
    assert os.environ["CXX"] == str(tmp_path / "none")


@pytest.mark.slow
def test_list_with_a_recipe_of_another_version(export: Callable, damaged: Path, package: Entry) -> None:
    shutil.copy(package.path, damaged.parent / "z.pt2")
    shutil.copy(package.path.with_suffix(".json"), damaged.parent / "z.json")
    forge(damaged, lambda manifest: manifest["identity"]["recipe"].update(tiling=True))
    other, known = export("list", damaged.parent).out.splitlines()
    assert "a recipe of another version of this program (a recipe has no field 'tiling')" in other
    assert "fp32,execution=aoti, cpu" in known


@pytest.mark.slow
def test_package_of_another_version(
    export: Callable, library: Library, after: PackagedRegion, damaged: Path, package: Entry
) -> None:
    forge(damaged, lambda manifest: manifest.update(schema=1, models={}))
    store = PackageStore(damaged.parent, build=False)
    assert (store.entries(), store.of_other_versions()) == ([], [damaged])
    assert export("list", damaged.parent).out.splitlines() == [
        f"{damaged.name}: of another version of this program, and of no use to it"
    ]
    for command in ("inspect", "verify"):
        done = export(command, damaged)
        assert done.code == 1
        assert "is of another version of this program (its schema is 1, this program reads " in done.error()
    inputs = inputs_of_after()
    with pytest.raises(UserError, match=r"no package in .* has the after for"):
        replace(library, store=store).find(after.region, inputs)
    # Beside one that fits it is in nobody's way.
    shutil.copy(package.path, damaged.parent / "fits.pt2")
    shutil.copy(package.path.with_suffix(".json"), damaged.parent / "fits.json")
    assert [entry.path.name for entry in store.entries()] == ["fits.pt2"]
    assert replace(library, store=store).find(after.region, inputs) is not None


@pytest.mark.slow
def test_a_package_names_no_folder_of_the_machine(
    export: Callable, tiny_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "packages"
    program = str(ROOT / "export" / "__main__.py")
    given = ("build", "--checkpoint", str(tiny_copy), f"--out={folder}", "--resolutions", "64x64")
    monkeypatch.setattr("sys.argv", [program, *given])
    _, library = order.pipeline(str(tiny_copy), Recipe(execution="aoti"), folder, torch.device("cpu"))
    assert library.checkpoint == str(tiny_copy), "as it has to be given here"
    (after,) = [region for region in library.packaged if region.region.name == "after"]
    entry, _ = library.build([(after, inputs_of_after())])
    assert entry.manifest.built.checkpoint == "copy"
    assert entry.manifest.built.command == (
        "python -m export build --checkpoint copy --out=packages --resolutions 64x64"
    )
    published = card("someone/packages", [Entry(Path(entry.path.name), entry.beside)])
    for text in (entry.path.with_suffix(".json").read_text(), published):
        assert str(tmp_path) not in text
        assert str(ROOT) not in text
    done = export("verify", entry.path)
    assert done.error().endswith("was built with weights from copy: say where they lie with --checkpoint")
    assert done.code == 2
    assert export("verify", entry.path, "--checkpoint", tiny_copy).code == 0
