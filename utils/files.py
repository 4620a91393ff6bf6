"""Files that are either whole or not there: written beside, then renamed."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from utils.errors import UsageError

ROOT = Path(__file__).resolve().parent.parent  # the repository


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path beside `path` (same suffixes) to write to; it becomes `path` when the body ends, else it is removed."""
    check_folder(path)
    handle, name = tempfile.mkstemp(prefix=f".{path.name.split('.')[0]}-", suffix="".join(path.suffixes), dir=path.parent)
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
    if not os.access(folder, os.W_OK):
        raise UsageError(f"the folder {folder} is not writable: choose another one")
