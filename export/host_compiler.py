"""The C++ of models compiled beside the preparation of the next ones.

Inductor has a model's C++ compiled and linked before it returns: three to six seconds for any model, however small, in
which it does nothing else, and much of a build. Within `beside` it goes on at once, and the compilers run in processes
of their own, as many as there are cores.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

from torch._inductor.cpp_builder import CppBuilder
from torch._inductor.exc import CppCompileError

_OF_MODELS = (".wrapper.cpp", ".kernel.cpp")


@contextmanager
def beside() -> Iterator[Compilers]:
    """Within, a model's library may be there later than Inductor says: once what it gives says so.

    One at a time in a process, and not for models with weights inside, which Inductor appends to the library.
    """
    at_once = CppBuilder.build
    compilers = Compilers()

    def build(builder: CppBuilder) -> None:
        if not compilers.take(builder):
            at_once(builder)

    try:
        with patch.object(CppBuilder, "build", build):
            yield compilers
    finally:
        compilers.close()


class Compilers:
    """Commands under way.

    Each has a folder of its own beside its target, with copies of what it reads: Inductor removes objects, and writes
    to sources, as soon as it takes them for compiled.
    """

    def __init__(self) -> None:
        self._compiling = ThreadPoolExecutor(len(os.sched_getaffinity(0)))
        self._linking = ThreadPoolExecutor(1)
        self._folders: list[Path] = []
        self._objects: dict[str, tuple[Path, Future[None]]] = {}  # by what Inductor calls them
        self._linked: list[Future[None]] = []  # and not yet asked for

    def take(self, builder: CppBuilder) -> bool:
        """Begin what `builder` is to build, if it is of a model."""
        command, target = shlex.split(builder.get_command_line()), builder.get_target_file_path()
        if sources := [argument for argument in command if argument.endswith(_OF_MODELS)]:
            self._compile(command, sources, target)
        elif any(argument in self._objects for argument in command):
            self._link(command, target)
        else:
            return False
        return True

    def linked(self) -> list[Future[None]]:
        """Of the libraries begun since this was asked last, when they are there; or CppCompileError, as of Inductor."""
        begun, self._linked = self._linked, []
        return begun

    def close(self) -> None:
        """Begin nothing more, and leave nothing behind."""
        pools = (self._compiling, self._linking)
        try:
            for pool in pools:
                pool.shutdown(wait=False, cancel_futures=True)
            for pool in pools:
                pool.shutdown()
        finally:
            for folder in self._folders:
                shutil.rmtree(folder, ignore_errors=True)  # where it was interrupted, something still writes there

    def _compile(self, command: list[str], sources: list[str], target: str) -> None:
        folder = self._folder(target)
        own = {source: _copied(source, folder) for source in sources} | {target: folder / "compiled.o"}
        Path(target).touch()  # which Inductor removes when it has linked it
        self._objects[target] = own[target], self._compiling.submit(_run, command, own, folder)

    def _link(self, command: list[str], target: str) -> None:
        folder, begun = self._folder(target), []
        own = {target: folder / "linked.so"}
        for argument in command:
            if argument in self._objects:
                own[argument], compiled = self._objects.pop(argument)
                begun.append(compiled)
            elif argument.endswith(".o"):
                own[argument] = _copied(argument, folder)

        def link() -> None:
            for compiled in begun:
                compiled.result()
            _run(command, own, folder)
            own[target].replace(target)

        self._linked.append(self._linking.submit(link))

    def _folder(self, target: str) -> Path:
        self._folders.append(Path(tempfile.mkdtemp(prefix=".beside-", dir=Path(target).parent)))
        return self._folders[-1]


def _copied(file: str, folder: Path) -> Path:
    """A copy of its name, which no other of this folder has: Inductor's names are hashes of what is in them."""
    return Path(shutil.copy(file, folder))


def _run(command: list[str], own: dict[str, Path], folder: Path) -> None:
    """`command`, with some of its files replaced."""
    replaced = [str(own.get(argument, argument)) for argument in command]
    done = subprocess.run(replaced, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    if done.returncode:
        raise CppCompileError(replaced, done.stdout.decode(errors="replace"))
