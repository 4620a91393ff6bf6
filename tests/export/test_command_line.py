"""python -m export: build, list, inspect, verify, doctor."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from subprocess import run

import pytest
import torch

from export import checks, doctor_child, order
from export.card import card
from export.runtime import BoundModel, Library, PackagedRegion
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
        (("--resolutions", ""), "--resolutions : give HEIGHTxWIDTH"),
        (("--resolutions", "64"), "give HEIGHTxWIDTH, as in 1024x1024,768x1344"),
        (("--resolutions", "60x64"), "--resolutions 60x64: 60 is not a positive multiple of 16: try 48 or 64"),
        (("--batch", "0"), "--batch 0: give positive whole numbers"),
        (("--text-lengths", "64,many"), "--text-lengths 64,many: give positive whole numbers"),
        (("--text-lengths", "64,100000"), "--text-lengths 100000: give 1 to 512, FLUX takes no more"),
        (("--out", "README.md"), "README.md is not a folder: choose another one"),
        (("--out", "README.md/new"), "README.md is not a folder: choose another one"),
        (("--out", "/proc/new"), "the folder /proc is not writable: choose another one"),
        (("--image-size", "64"), "--image-size 64: give HEIGHTxWIDTH, as in 768x1344"),
        (("--image-size", "64x64"), "--image-size: tiny takes no image; leave it out"),
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
    assert f"{tmp_path} is a folder: give a package's .pt2 file" in export("inspect", tmp_path).error()
    (tmp_path / "a.txt").write_text("")
    assert "a.txt is a file, not a folder of packages" in export("list", tmp_path / "a.txt").error()
    assert "a.txt is no .pt2 file: give a package's" in export("inspect", tmp_path / "a.txt").error()


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
    assert line.startswith(f"{package.path}: draws 64x64; {package.beside.size / 1e6:.2f} MB, ")
    assert line.endswith(", fp32,execution=aoti: before, double_block, single_block, after, vae_decoder")
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


def of_after(manifest: dict, change: Callable[[dict], object]) -> None:
    (name,) = [name for name in manifest["models"] if name.startswith("after-")]
    change(manifest["models"][name]["inputs"]["temb"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m["identity"].update(torch="1.0"), "was built for torch 1.0, this is"),
        (lambda m: m["identity"].update(dtype="float16"), "was built for dtype float16, this is float32"),
        (lambda m: m["identity"]["recipe"].clear(), "says that it was built for execution=eager"),
        (lambda m: m["identity"]["recipe"].update(execution="later"), "execution"),
        (lambda m: m["models"].clear(), "manifest.models is empty"),
        (lambda m: of_after(m, lambda spec: spec.update(dtype="float99")), "PyTorch has no dtype 'float99'"),
        (lambda m: of_after(m, lambda spec: spec.update(shape=[-1, 256])), "no tensor is float32[-1, 256]"),
        (lambda m: of_after(m, lambda spec: spec.update(shape=[256])), "no tensor is float32[256] with strides"),
    ],
    ids=["torch", "dtype", "no-recipe", "execution", "no-models", "inputs-dtype", "negative", "strides"],
)
def test_verify_refuses_in_one_line(export: Callable, damaged: Path, change: Callable, words: str) -> None:
    forge(damaged, change)
    done = export("verify", damaged)
    assert done.code in (1, 2)
    assert words in done.error()
    assert not done.out


@pytest.mark.slow
def test_damaged_file(export: Callable, damaged: Path) -> None:
    damaged.write_bytes(damaged.read_bytes()[:-1])
    for command in ("inspect", "verify"):
        done = export(command, damaged)
        assert "bytes, its manifest says" in done.error()
        assert done.code == 1


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
LAST_LAYERS = "a package of the transformer's last layers"


def compiler(tmp_path: Path, more: str) -> str:
    """The machine's g++ with more arguments where it links."""
    path = tmp_path / "g++"
    linking = 'for argument; do [ "$argument" = -shared ] && set -- "$@" $MORE; done'
    path.write_text(f'#!/bin/sh\nMORE="{more}"\n{linking}\nexec /usr/bin/env g++ "$@"\n')
    path.chmod(0o755)
    return str(path)


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
def test_doctor_where_all_is_well(export: Callable, device: str) -> None:
    done = export("doctor", "--device", device)
    assert done.code == 0, done.out
    assert done.out.splitlines()[-1] == f"ok    {LAST_LAYERS}: compiled, loaded, run, and right"
    assert "WRONG" not in done.out


@pytest.mark.slow
def test_doctors_package_is_one_of_ours(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this process: compiled, written with its manifest, checked, bound and run by what all packages go through."""
    doctor_child.main(str(tmp_path), "cpu")
    assert capfd.readouterr().out.split() == ["compiled", "loaded", "ran", "right"]
    (entry,) = PackageStore(tmp_path).entries()
    assert [model.region for model in entry.manifest.models.values()] == ["after"]
    assert checks.refusal(entry) is None
    run_right = BoundModel.__call__
    monkeypatch.setattr(BoundModel, "__call__", lambda self, inputs: run_right(self, inputs) + 1)
    with pytest.raises(AssertionError):
        doctor_child.main(str(tmp_path), "cpu")
    assert capfd.readouterr().out.split() == ["compiled", "loaded", "ran"]
    with pytest.raises(AssertionError):
        doctor_child.main(str(tmp_path / "new"), "cpu")
    assert capfd.readouterr().out.split() == ["compiled", "loaded", "ran"], "also where it is built first"
    monkeypatch.setattr(BoundModel, "__call__", run_right)
    entry.path.write_bytes(entry.path.read_bytes()[:-1])
    doctor_child.main(str(tmp_path), "cpu")
    done = capfd.readouterr()
    assert done.out.split() == ["compiled", "loaded", "ran", "right"]
    assert "bytes, its manifest says" in done.err
    assert "building it anew" in done.err


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
def test_doctor_finds_a_compiler_that_links_its_library_statically(
    export: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    monkeypatch.setenv("CXX", compiler(tmp_path, "-static-libstdc++"))
    done = export("doctor", "--device", device)
    assert "links libstdc++ statically, and every package crashes" in done.error()
    assert done.code == 1


@pytest.mark.slow
def test_doctor_finds_a_package_that_dies_when_it_is_loaded(
    export: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Really: the compiler links something in that ends any process that loads it."""
    (tmp_path / "dies.c").write_text(
        "#include <stdlib.h>\n__attribute__((constructor)) static void dies(void) { abort(); }\n"
    )
    run(["gcc", "-c", "-fPIC", "-o", tmp_path / "dies.o", tmp_path / "dies.c"], check=True)
    monkeypatch.setenv("CXX", compiler(tmp_path, str(tmp_path / "dies.o")))
    done = export("doctor")
    assert done.out.splitlines()[-1] == (
        f"WRONG {LAST_LAYERS}: the process died of SIGABRT at the step 'load': the compiler's C++ library or CUDA "
        "doesn't go with PyTorch's: set CXX to another g++"
    )
    assert f"packages don't work here: {LAST_LAYERS}: the process died of SIGABRT" in done.error()
    assert done.code == 1


@pytest.mark.slow
def test_doctor_without_a_compiler(export: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = tmp_path / "none"
    monkeypatch.setenv("CXX", str(missing))
    done = export("doctor")
    assert f"{missing} is not there; apt-get install g++" in done.error()
    of_compiler, of_package = (line for line in done.out.splitlines() if line.startswith("WRONG"))
    assert of_compiler.startswith(f"WRONG C++ compiler: {missing} is not there: apt-get install g++, or set CXX")
    assert of_package.startswith(f"WRONG {LAST_LAYERS}: the step 'compile' failed (")
    assert str(missing) in of_package
    assert os.environ["CXX"] == str(missing)


@pytest.mark.skipif(torch.cuda.is_available(), reason="here CUDA can be had")
def test_doctor_asked_for_cuda_that_is_absent(export: Callable) -> None:
    done = export("doctor", "--device", "cuda")
    first, *others = done.out.splitlines()
    assert first.startswith(f"WRONG PyTorch: {torch.__version__}")
    why = ("has no CUDA", "install a build of PyTorch for a CUDA version that the driver supports")
    if torch.version.cuda is not None:
        why = ("sees none", "see that nvidia-smi lists the GPU")
    assert f"and this PyTorch {why[0]}: {why[1]}" in first
    assert not any(LAST_LAYERS in line for line in others), "what there is no device for isn't tried"
    assert "packages don't work here: PyTorch: " in done.error()
    assert done.code == 1


@pytest.mark.slow
def test_list_with_a_recipe_of_another_version(export: Callable, damaged: Path, package: Entry) -> None:
    shutil.copy(package.path, damaged.parent / "z.pt2")
    shutil.copy(package.path.with_suffix(".json"), damaged.parent / "z.json")
    forge(damaged, lambda manifest: manifest["identity"]["recipe"].update(tiling=True))
    other, known = export("list", damaged.parent).out.splitlines()
    assert "a recipe of another version of this program (a recipe has no field 'tiling')" in other
    assert ", fp32,execution=aoti: before, " in known


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
    with pytest.raises(UserError, match=r"no package in .* has the region after for hidden_states float32\["):
        replace(library, store=store).find(after.region, inputs)
    # Beside one that fits it is in nobody's way.
    shutil.copy(package.path, damaged.parent / "fits.pt2")
    shutil.copy(package.path.with_suffix(".json"), damaged.parent / "fits.json")
    assert [entry.path.name for entry in store.entries()] == ["fits.pt2"]
    assert replace(library, store=store).find(after.region, inputs) is not None


@pytest.mark.slow
def test_a_damaged_one_beside_one_that_fits(
    export: Callable, library: Library, after: PackagedRegion, damaged: Path
) -> None:
    shutil.copy(damaged, damaged.parent / "a.pt2")
    (damaged.parent / "a.json").write_text("{")
    done = export("list", damaged.parent)
    assert done.code == 1
    assert done.out.startswith(f"{damaged}: draws 64x64; ")
    assert "a.json is damaged" in done.error()
    fresh = replace(library, store=PackageStore(damaged.parent, build=False))
    assert fresh.find(after.region, inputs_of_after()) is not None
    damaged.with_suffix(".json").unlink()
    with pytest.raises(UserError, match=r"a\.json is damaged .*: delete it and a\.pt2"):
        fresh.find(after.region, inputs_of_after())


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
