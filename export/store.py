"""A folder of packages, NAME.pt2 with NAME.json beside it: found by what is in them, written whole or not at all.

A package is there once its NAME.json is, which is written last. A build holds a lock that ends with its process.
"""

from __future__ import annotations

import hashlib
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from filelock import FileLock, Timeout
from tqdm import tqdm

from export.manifest import Beside, Manifest, OtherVersionError, read_beside
from utils.errors import UsageError, UserError
from utils.files import ForbiddenError, check_target, permitted, replacing, write_text


def default_folder() -> Path:
    return Path.home() / ".cache" / "flux-fast"


@dataclass(frozen=True)
class Entry:
    """A package and what lies beside it."""

    path: Path
    beside: Beside

    @property
    def manifest(self) -> Manifest:
        return self.beside.manifest

    def damage(self) -> str | None:
        """What the file's size tells of damage, without its being read; None if it is as it was."""
        size = self.path.stat().st_size
        return None if size == self.beside.size else f"has {size} bytes, its manifest says {self.beside.size}"


@dataclass(frozen=True)
class _Unread:
    """A manifest beside a package that can't be read, and why."""

    beside: Path
    reason: str
    of_other_version: bool


@dataclass
class PackageStore:
    """A folder of packages; `build`: whether what is missing may be built, and `to_build`: what to do that it may."""

    folder: Path = field(default_factory=default_folder)
    build: bool = True
    to_build: str = "apply the recipe with a PackageStore that may build"
    # By file, its time, which changes with its permissions too, and which file the package is.
    _read: dict[tuple[Path, int, int], Entry | _Unread] = field(default_factory=dict, repr=False)

    def entries(self) -> list[Entry]:
        """The packages that are there, by name, without those `of_other_versions` and those that are `damaged`.

        Raises:
            UsageError: the folder is a file.
            ForbiddenError: the folder may not be read.
        """
        return [one for one in self._found() if isinstance(one, Entry)]

    def of_other_versions(self) -> list[Path]:
        """Packages that other versions of this program left, and that nothing here can run."""
        unread = [one for one in self._found() if isinstance(one, _Unread)]
        return [one.beside.with_suffix(".pt2") for one in unread if one.of_other_version]

    def damaged(self) -> list[str]:
        """What is wrong with the manifests that can't be read, a line each."""
        unread = [one for one in self._found() if isinstance(one, _Unread)]
        return [one.reason for one in unread if not one.of_other_version]

    @permitted("read")
    def _found(self) -> list[Entry | _Unread]:
        if not self.folder.is_dir():
            if self.folder.exists():
                raise UsageError(f"{self.folder} is a file, not a folder of packages")
            return []
        found = []
        # Not glob, which takes a folder that it may not read for an empty one.
        for path in sorted(path for path in self.folder.iterdir() if path.match("[!.]*.json")):
            with suppress(FileNotFoundError):  # it is being built anew
                known = path, path.stat().st_ctime_ns, path.with_suffix(".pt2").stat().st_ino
                if known not in self._read:
                    try:
                        self._read[known] = entry(path)
                    except UserError as error:
                        self._read[known] = _Unread(path, str(error), isinstance(error, OtherVersionError))
                found.append(self._read[known])
        return found

    def write(
        self, name: str, make: Callable[[Path], Manifest], refusal: Callable[[Entry], str | None] | None = None
    ) -> tuple[Entry, bool]:
        """The package NAME, made by `make(path)` if it isn't there, and whether it was there.

        refusal: says of one that is there why it isn't whole; then it is made anew, and so it is where its manifest
        can't be read. Without `refusal`, what is there stays.

        Of several processes that write one name, one makes it, and the others wait for it.

        Raises:
            UsageError: the folder can't be made or written to.
            ForbiddenError: what another user left there may not be read, or its lock not be taken.
            UserError: without `refusal`: the manifest that is there can't be read.
        """
        check_target(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        path, beside = self.folder / f"{name}.pt2", self.folder / f"{name}.json"
        with _locked(self.folder / f".{name}.lock"):
            if beside.exists() and path.exists():
                reason = None if refusal is None else _unusable(beside, refusal)
                if reason is None:
                    return entry(beside), True
                tqdm.write(f"{reason}: building it anew", file=sys.stderr)  # between progress bars
            self._clean(name)
            with replacing(path) as temporary:
                made = not_yet_stored(temporary, make(temporary))
                beside.unlink(missing_ok=True)
            write_text(beside, made.beside.to_json())
        return entry(beside), False

    def _clean(self, name: str) -> None:
        """Remove what a build of `name` that was killed left behind."""
        for rest in self.folder.glob(f".{name}-*"):
            if rest.is_dir():
                shutil.rmtree(rest)
            else:
                rest.unlink()


def entry(beside: Path) -> Entry:
    return Entry(beside.with_suffix(".pt2"), read_beside(beside))


def _unusable(beside: Path, refusal: Callable[[Entry], str | None]) -> str | None:
    try:
        found = entry(beside)
        reason = refusal(found)
    except ForbiddenError:  # and so nothing is known of it
        raise
    except UserError as error:
        return str(error).partition(":")[0]  # and not what to do about it
    return reason and f"{found.path} {reason}"


def not_yet_stored(path: Path, manifest: Manifest) -> Entry:
    """The entry of a package that has nothing beside it yet."""
    return Entry(path, Beside(manifest, path.stat().st_size, sha256(path)))


@permitted("read")
def of_file(path: Path) -> Entry:
    """The entry of a package given by the name of its file.

    Raises:
        UsageError: there is no such file, it isn't a package's, or there is none beside it.
        UserError: its manifest can't be read.
        ForbiddenError: its permissions, or its folder's, don't allow it.
    """
    for file in (path, path.with_suffix(".json")):
        fault = "is not there" if not file.exists() else "is a folder" if file.is_dir() else None
        if fault is None and path.suffix != ".pt2":
            fault = "is no .pt2 file"
        if fault is not None:
            raise UsageError(f"{file} {fault}: give a package's .pt2 file with its .json beside it")
    return entry(path.with_suffix(".json"))


@permitted("read")
def sha256(path: Path) -> str:
    """Raises ForbiddenError: the file may not be read."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def state(path: Path) -> tuple[int, ...]:
    """What changes when a file's content does: which file it is, its size and its time."""
    found = path.stat()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    lock = FileLock(path)
    try:
        with permitted("written"):
            lock.acquire(timeout=0)
    except Timeout:
        print(f"waiting for another process that builds {path.stem[1:]}", file=sys.stderr)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
