"""All that is checked of a package before its native code is loaded."""

from __future__ import annotations

import json
import zipfile
from dataclasses import asdict
from typing import Any

from export.build import MANIFEST_RECORD
from export.store import Entry, sha256
from utils.errors import UserError


def check_file(entry: Entry, remedy: str) -> None:
    """The file is the one that was built: its size, its sha256, its records, and the manifest in it.

    remedy: what to do about it, the end of the error's line.

    Raises:
        UserError: it is damaged, or another one.
    """
    reason = refusal(entry)
    if reason is not None:
        raise UserError(f"{entry.path} {reason}: {remedy}")


def refusal(entry: Entry) -> str | None:
    """Why the file isn't the one that was built; None if it is."""
    beside = entry.beside
    try:
        if (damage := entry.damage()) is not None:
            return damage
        digest = sha256(entry.path)
        if digest != beside.sha256:
            return f"has sha256 {digest[:16]}, its manifest says {beside.sha256[:16]}"
        inside = _manifest_inside(entry)
    except (zipfile.BadZipFile, OSError, ValueError, KeyError, EOFError, RecursionError) as error:
        return f"is no whole package ({error})"
    outside = json.loads(json.dumps(asdict(entry.manifest)))
    different = _difference(inside, outside)
    if different is not None:
        return f"was built otherwise than the manifest beside it says, in {different}"
    return None


def _manifest_inside(entry: Entry) -> Any:
    with zipfile.ZipFile(entry.path) as archive:
        damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"its record {damaged} is damaged")
        (record,) = [name for name in archive.namelist() if name.endswith(f"/{MANIFEST_RECORD}")]
        return json.loads(archive.read(record))


def _difference(one: Any, other: Any, where: str = "") -> str | None:
    """Where two JSON values differ; None if they don't."""
    if type(one) is not type(other):
        return where or "everything"
    if isinstance(one, dict):
        for name in sorted({*one, *other}):
            inner = f"{where}.{name}".lstrip(".")
            if name not in one or name not in other:
                return inner
            if (found := _difference(one[name], other[name], inner)) is not None:
                return found
        return None
    return None if one == other else where
