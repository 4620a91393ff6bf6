"""C++ compiled beside other work: of the right sources, whole or not at all, with nothing left behind."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from torch._inductor.cpp_builder import BuildOptionsBase, CppBuilder
from torch._inductor.exc import CppCompileError

from export import host_compiler, order
from tests.export.conftest import AOTI, CPU, inputs_of_after
from utils.errors import UserError

BUILD = CppBuilder.build


@pytest.fixture
def late(tmp_path: Path) -> Path:
    """A compiler that waits until a file `go` lies beside it."""
    script = tmp_path / "late"
    script.write_text('#!/bin/sh\nwhile [ ! -e "$(dirname "$0")/go" ]; do sleep 0.02; done\nexec g++ "$@"\n')
    script.chmod(0o755)
    return script


@pytest.fixture
def model(tmp_path: Path) -> Callable[..., Model]:
    """model(compiler, name, value): of that name, whose library says 6 times `value`."""

    def of(compiler: object, name: str = "m", value: str = "7") -> Model:
        sources = {
            f"{name}.wrapper.cpp": f'int of_kernel(); extern "C" int value() {{ return {value} * of_kernel(); }}',
            f"{name}.kernel.cpp": "int of_kernel() { return 6; }",
            f"{name}.weights.cpp": "int weights;",
        }
        for file, source in sources.items():
            (tmp_path / file).write_text(source)
        return Model(tmp_path, name, str(compiler))

    return of


@dataclass(frozen=True)
class Model:
    """What Inductor builds of one, as it does."""

    folder: Path
    name: str
    compiler: str

    @property
    def library(self) -> Path:
        return self.folder / f"{self.name}.so"

    def build(self) -> None:
        sources = [self.folder / f"{self.name}.{part}.cpp" for part in ("wrapper", "kernel", "weights")]
        objects = []
        for source in sources:
            options = BuildOptionsBase(self._by(source), cflags=["fPIC"], compile_only=True)
            builder = CppBuilder(source.stem, str(source), options, str(self.folder))
            builder.build()
            objects.append(builder.get_target_file_path())
        linker = CppBuilder(self.name, objects, BuildOptionsBase("g++", ldflags=["shared"]), str(self.folder))
        for source in sources:
            source.write_text("what was linked, and how")
        linker.build()
        for file in objects:
            Path(file).unlink()

    def _by(self, source: Path) -> str:
        return "g++" if ".weights." in source.name else self.compiler

    def value(self) -> int:
        return ctypes.CDLL(str(self.library)).value()


def assert_nothing_left(folder: Path) -> None:
    assert CppBuilder.build is BUILD
    assert not list(folder.glob(".*"))
    assert not list(folder.glob("*.o"))


def test_goes_on_while_compilers_run(model: Callable, late: Path, tmp_path: Path) -> None:
    first, second = model(late), model(late, "other", "5")
    with host_compiler.beside() as compilers:
        first.build()
        second.build()
        begun = compilers.linked()
        assert len(begun) == 2
        assert not compilers.linked()
        assert not first.library.exists()
        (tmp_path / "go").touch()
        for library in begun:
            library.result()
        assert (first.value(), second.value()) == (42, 30)
    assert_nothing_left(tmp_path)


def test_what_does_not_compile(model: Callable, tmp_path: Path) -> None:
    wrong, right = model("g++", value="nonsense"), model("g++", "other")
    with pytest.raises(CppCompileError, match="nonsense"), host_compiler.beside() as compilers:
        wrong.build()
        right.build()
        of_wrong, of_right = compilers.linked()
        of_right.result()
        of_wrong.result()
    assert not wrong.library.exists()
    assert_nothing_left(tmp_path)


def test_what_does_not_link(model: Callable, tmp_path: Path) -> None:
    wrong = model("g++")
    (tmp_path / "m.kernel.cpp").write_text('extern "C" int value() { return 0; }')
    with pytest.raises(CppCompileError, match="multiple definition"), host_compiler.beside() as compilers:
        wrong.build()
        compilers.linked()[0].result()
    assert not wrong.library.exists()
    assert_nothing_left(tmp_path)


def test_what_fails_meanwhile_ends_all(model: Callable, late: Path, tmp_path: Path) -> None:
    begun = [model(late, f"m{i}") for i in range(20)]
    with pytest.raises(KeyError, match="meanwhile"), host_compiler.beside():
        for one in begun:
            one.build()
        (tmp_path / "go").touch()
        raise KeyError("meanwhile")
    assert not begun[-1].library.exists(), "it wasn't begun"
    assert_nothing_left(tmp_path)


def test_other_builds_are_done_at_once(model: Callable, tmp_path: Path) -> None:
    one = model("g++")
    source = (tmp_path / "m.wrapper.cpp").rename(tmp_path / "m.cpp")
    options = BuildOptionsBase("g++", cflags=["fPIC"], compile_only=True)
    with host_compiler.beside():
        CppBuilder("m", str(source), options, str(one.folder)).build()
        assert (tmp_path / "m.o").stat().st_size > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dynamic", "words"),
    [
        (False, r"the package can't be compiled \(CppCompileError: C\+\+ compile error\): `python -m export doctor` "),
        (True, r"for 16 to 32 image tokens \(C\+\+ compile error\): build it without --dynamic"),
    ],
)
def test_a_build_tells_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dynamic: bool, words: str) -> None:
    _, library = order.pipeline("tiny", AOTI, tmp_path, CPU)
    (after,) = [region for region in library.packaged if region.region.name == "after"]
    monkeypatch.setattr(host_compiler, "_run", refusing)
    calls = [(after, inputs_of_after()), (after, inputs_of_after(tokens=32))]
    with pytest.raises(UserError, match=words):
        library.build(calls, dynamic=dynamic)
    assert not list(tmp_path.glob("*.pt2"))
    assert CppBuilder.build is BUILD


def refusing(command: list[str], own: dict[str, Path], folder: Path) -> None:
    raise CppCompileError(command, "no space left")
