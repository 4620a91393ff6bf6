"""Files that are either whole or not there: written beside, then renamed; and whether one may read or write them."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image

from utils.errors import UsageError, UserError

ROOT = Path(__file__).resolve().parent.parent  # the repository


class ForbiddenError(UserError):
    """A file or a folder is there, and its permissions keep this user from it: it may well be whole."""


@contextmanager
def permitted(what: str) -> Iterator[None]:
    """`what` the body does with files: "read", "written".

    Raises:
        ForbiddenError: their permissions don't allow it.
    """
    try:
        yield
    except PermissionError as error:
        raise ForbiddenError(
            f"{error.filename} may not be {what} by you ({error.strerror}): have its owner change its permissions "
            "(chmod), or choose another folder"
        ) from None


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path beside `path` (same suffixes) to write to; it becomes `path` when the body ends, else it is removed."""
    check_folder(path)
    handle, name = tempfile.mkstemp(
        prefix=f".{path.name.split('.')[0]}-", suffix="".join(path.suffixes), dir=path.parent
    )
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text)


def check_target(folder: Path) -> None:
    """Raise UsageError unless files could be put into `folder`, which is made for them where it isn't there.

    Raises:
        UsageError: it or a folder that it would be in is a file, or not writable.
    """
    there = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    if not there.is_dir():
        raise UsageError(f"{there} is not a folder: choose another one")
    _check_writable(there)


def check_folder(path: Path) -> None:
    """Raise UsageError unless a file `path` could be written.

    Raises:
        UsageError: its folder is missing or not writable, or it is itself a folder.
    """
    folder = path.parent
    if path.is_dir():
        raise UsageError(f"{path} is a folder: give the name of a file")
    if not folder.is_dir():
        raise UsageError(f"the folder {folder} does not exist: create it with `mkdir -p {folder}`")
    _check_writable(folder)


def check_image_file(path: Path) -> None:
    """`check_folder`, and that the file's suffix is an image format's, which else shows only when it is written.

    Raises:
        UsageError: as for `check_folder`, or an unknown suffix.
    """
    if Image.registered_extensions().get(path.suffix.lower()) not in Image.SAVE:
        raise UsageError(f"{path}: no image format is called {path.suffix!r}, take .png, .jpg or .webp")
    check_folder(path)


def _check_writable(folder: Path) -> None:
    try:
        tempfile.TemporaryFile(dir=folder).close()  # permissions alone don't tell of a read-only file system
    except OSError:
        raise UsageError(f"the folder {folder} is not writable: choose another one") from None
