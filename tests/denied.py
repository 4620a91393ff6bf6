"""What a user without the permission meets."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_NOBODY = 65534


@contextmanager
def denied(path: Path) -> Iterator[None]:
    """Nobody may read or write `path`; also root may not, for whom permissions don't bind otherwise."""
    mode, user = path.stat().st_mode, os.geteuid()
    path.chmod(0)
    if user == 0:
        os.seteuid(_NOBODY)
    try:
        yield
    finally:
        if user == 0:
            os.seteuid(user)
        path.chmod(mode)
