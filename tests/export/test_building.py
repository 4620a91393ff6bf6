"""Builds are whole or not there: killed half-way, two at a time, a second time."""

from __future__ import annotations

import functools
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from export import build, manifest, order
from export.build import Call
from export.checks import refusal
from export.runtime import PackagedRegion
from export.store import Entry, PackageStore
from recipes import Recipe
from tests.export.conftest import AOTI, CPU, inputs_of_after
from tests.export.test_command_line import compiler
from utils import errors
from utils.errors import OutOfMemoryError, UserError
from utils.files import ROOT

BUILD = """
import sys
from pathlib import Path
import torch
from tests.export.conftest import AOTI, CPU, inputs_of_after
from export import build, order
_, library = order.pipeline("tiny", AOTI, Path(sys.argv[1]), CPU)
(after,) = [region for region in library.packaged if region.region.name == "after"]
print("was there" if library.build([(after, inputs_of_after())])[1] else "built")
"""


def builder(folder: Path) -> subprocess.Popen:
    """A process that builds the smallest region's package."""
    return subprocess.Popen(
        [sys.executable, "-c", BUILD, str(folder)], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def after_of(folder: Path, recipe: Recipe = AOTI) -> PackagedRegion:
    _, library = order.pipeline("tiny", recipe, folder, CPU)
    (after,) = [region for region in library.packaged if region.region.name == "after"]
    return after


@pytest.mark.slow
def test_killed_half_way_then_two_at_once(tmp_path: Path) -> None:
    killed = builder(tmp_path)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob(".transformer-*/")):  # the folder of the build
        assert killed.poll() is None, killed.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(1)  # in the middle of compiling
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    killed.communicate()
    assert any(path.suffix != ".lock" for path in tmp_path.iterdir()), "it was killed in the middle"
    assert PackageStore(tmp_path).entries() == []

    two = [builder(tmp_path), builder(tmp_path)]
    said = [process.communicate() for process in two]
    assert sorted(out.strip() for out, _ in said) == ["built", "was there"], said
    assert len([path for path in tmp_path.iterdir() if path.suffix == ".pt2"]) == 1
    assert len(list(tmp_path.iterdir())) == 3, ".pt2, .json and .lock, and nothing of the killed build"

    after = after_of(tmp_path)
    after.packages.store.build = False
    inputs = inputs_of_after()
    with after.unpackaged() as module:
        expected = module(**inputs)
    torch.testing.assert_close(after(**inputs), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_code_that_computes_something_else_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    after = after_of(tmp_path)
    compile_call = build.compile_call

    def of_twice_as_much(call: Call, *rest: Any) -> list[Any]:
        forward = call.module.forward

        @functools.wraps(forward)
        def twice(*args: Any, **kwargs: Any) -> torch.Tensor:
            return 2 * forward(*args, **kwargs)

        with monkeypatch.context() as patched:
            patched.setattr(call.module, "forward", twice)
            return compile_call(call, *rest)

    assert torch.is_grad_enabled()
    with monkeypatch.context() as patched, pytest.raises(UserError) as raised:
        patched.setattr(build, "compile_call", of_twice_as_much)
        after.packages.build([(after, inputs_of_after())])
    (line,) = str(raised.value).splitlines()
    assert line.startswith(
        "no package was written, for what was compiled computes something else than the module: after-"
    )
    assert ": WRONG, relative error 1 (at most 0.0001), 1 module; use a recipe with execution=compile" in line
    assert after.module.forward is after, "as before the build"
    assert [path.suffix for path in tmp_path.iterdir()] == [".lock"]
    assert PackageStore(tmp_path).entries() == []

    entry, was_there = after.packages.build([(after, inputs_of_after())])
    assert not was_there
    assert PackageStore(tmp_path).entries() == [entry]
    assert len(list(tmp_path.iterdir())) == 3, ".pt2, .json and .lock"


@pytest.mark.slow
def test_what_is_built_is_held_to_the_module_that_it_was_built_from(tmp_path: Path) -> None:
    """Not to another one of its kind, whose weights may lie otherwise."""
    _, library = order.pipeline("tiny", AOTI, tmp_path, CPU)
    last = [region for region in library.packaged if region.region.name == "single_block"][-1]
    weight = last.module.proj_out.weight
    weight.data = weight.data.t().contiguous().t()
    random = torch.Generator().manual_seed(0)
    sizes = {"hidden_states": (1, 16, 256), "encoder_hidden_states": (1, 8, 256), "temb": (1, 256)}
    inputs: dict[str, Any] = {name: torch.randn(size, generator=random) for name, size in sizes.items()}
    rotary = tuple(torch.randn(24, 128, generator=random) for _ in range(2))
    entry, _ = library.build([(last, last.region.arguments((), {**inputs, "image_rotary_emb": rotary}))])
    (model,) = entry.manifest.models.values()
    assert model.weights["proj_out.weight"].stride == tuple(weight.stride())


@pytest.fixture
def failing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException], None]:
    """failing(error): a build in which the compiler raises it."""
    after = after_of(tmp_path)

    def build_it(error: BaseException) -> None:
        def compile_call(*arguments: object) -> None:
            raise error

        monkeypatch.setattr(build, "compile_call", compile_call)
        after.packages.build([(after, inputs_of_after())])

    return build_it


def test_a_compiler_that_fails(failing: Callable, tmp_path: Path) -> None:
    error = RuntimeError("\nno g++\nCommand: g++")
    with pytest.raises(UserError) as raised:
        failing(error)
    assert str(raised.value) == (
        "the package can't be compiled (RuntimeError: no g++): `python -m export doctor` says whether it is the "
        "compiler here"
    )
    assert raised.value.__cause__ is error, "for --debug"
    assert [path.suffix for path in tmp_path.iterdir()] == [".lock"]


@pytest.mark.parametrize(
    "error",
    [
        UserError("do this"),
        OutOfMemoryError("out of memory while testing: do that"),
        OSError("No space left on device"),
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
        KeyboardInterrupt(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_else_ends_a_build_stays_as_it_is(failing: Callable, error: BaseException) -> None:
    with pytest.raises(type(error)) as raised:
        failing(error)
    assert raised.value is error


def test_code_that_cannot_be_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"^after-1 can't be loaded from its package \(.*\): `python -m export doctor`"):
        build.loader(tmp_path / "none.pt2", "after-1", -1)
    refused = iter((0, 1))  # where memory runs out on a GPU, the code only says which of its calls failed
    monkeypatch.setattr(build, "refused", lambda: next(refused))
    monkeypatch.setattr(errors, "refused", lambda: next(refused))

    def load(*arguments: object) -> None:
        raise RuntimeError("create_func_() API call failed")

    monkeypatch.setattr(torch._C._aoti, "AOTIModelPackageLoader", load)
    with pytest.raises(RuntimeError, match="API call failed"):
        build.loader(tmp_path / "none.pt2", "after-1", -1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("more", "words"),
    [
        (None, "the package can't be compiled (InductorError: InvalidCxxCompiler: "),
        ("-static-libstdc++", " can't be loaded from its package (RuntimeError: create_func_("),
    ],
    ids=["missing", "static"],
)
def test_a_compiler_that_does_not_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: str | None, words: str
) -> None:
    monkeypatch.setenv("CXX", "/nonexistent" if more is None else compiler(tmp_path, more))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))  # what a better one has made is elsewhere
    child = builder(tmp_path / "packages")
    _, said = child.communicate()
    assert child.returncode == 1
    last = said.splitlines()[-1]
    assert words in last
    assert "`python -m export doctor` says whether it is the compiler here" in last


def test_package_is_there_only_with_what_lies_beside_it(tmp_path: Path) -> None:
    (tmp_path / "transformer-0123.pt2").write_bytes(b"written, and then the process was killed")
    assert PackageStore(tmp_path).entries() == []


@pytest.mark.slow
def test_what_is_damaged_is_built_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    after = after_of(tmp_path)

    def built() -> tuple[Entry, bool]:
        entry, was_there = after.packages.build([(after, inputs_of_after())])
        assert refusal(entry) is None
        return entry, was_there

    entry, _ = built()
    content, beside = entry.path.read_bytes(), entry.path.with_suffix(".json")
    for file, damaged, words in (
        (entry.path, content[:-1] + b"x", "has sha256"),
        (beside, beside.read_bytes().replace(b'"schema": 3', b'"schema": 2'), "is of another version of this program"),
        (beside, b"{", "is damaged"),
    ):
        file.write_bytes(damaged)
        capsys.readouterr()
        assert built()[1] is False
        said = capsys.readouterr().err
        assert words in said
        assert "building it anew" in said
        assert built()[1] is True


def test_name_belongs_to_recipe_weights_inputs_and_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found without compiling: the name is known before."""
    names = []

    def name(recipe: Recipe = AOTI, change: str = "", **inputs: int) -> str:
        after = after_of(tmp_path, recipe)
        if change:
            monkeypatch.setattr(after.packages, "identity", change_of(after, change))
        monkeypatch.setattr(after.packages.store, "write", lambda name, make, refusal: names.append(name))
        after.packages.build([(after, inputs_of_after(**inputs))])
        return names[-1]

    def change_of(after: PackagedRegion, field: str) -> object:
        from dataclasses import replace

        return replace(after.packages.identity, **{field: "other"})

    same = name()
    assert same == name(Recipe(execution="aoti", scheduler_sync_removal=True)), "it shapes no graph"
    others = [
        name(Recipe(execution="aoti", fused_qkv=True)),
        name(Recipe(execution="aoti", max_autotune=True)),
        name(Recipe(execution="aoti", dtype="bfloat16")),
        name(batch=2),
        *(name(change=field) for field in ("torch", "cuda", "arch", "sources", "diffusers", "cudnn_frontend")),
    ]
    assert len({same, *others}) == 1 + len(others)


SHAPING = ["build", "conv_layouts", "host_code", "regions", "sizes"]
KERNELS = ["wgmma_linear.cu", "hopper.cuh", "qkv.py"]


@pytest.mark.parametrize(
    "name", [*(f"export/{name}.py" for name in SHAPING), *(f"recipes/kernels/{name}" for name in KERNELS)]
)
def test_how_graphs_are_compiled_is_one_of_the_sources(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("export", "recipes"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    monkeypatch.setattr(manifest, "ROOT", tmp_path)
    hashed = manifest.sources.__wrapped__
    assert hashed() == manifest.sources()
    with (tmp_path / name).open("a") as file:
        file.write("# as it was before it was mended\n")
    assert hashed() != manifest.sources()


@pytest.mark.parametrize(
    ("given", "recorded"),
    [
        (["--checkpoint", "/home/her name/flux", "--out", "/tmp/c/"], "--checkpoint flux --out c"),
        (["--out=/tmp/a/c", "--resolutions", "64x64"], "--out=c --resolutions 64x64"),
        (["--checkpoint", "black-forest-labs/FLUX.1-dev", "--out", "../c/d"], None),
        (["--prompt", "a cat / a dog, and/or both, see http://a/b"], None),
        (
            ['{"folder": "/tmp/a/packages", "command": "python -m x --out /a/b --n 1"}'],
            """'{"folder": "packages", "command": "python -m x --out b --n 1"}'""",
        ),
    ],
)
def test_the_recorded_command_names_no_folder_of_the_machine(
    given: list[str], recorded: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["/home/she/flux-fast/export/__main__.py", "build", *given])
    assert build.command_line() == f"python -m export build {recorded or shlex.join(given)}"
