"""A real package, built once, and copies of it to damage."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from export import order
from export.build import MANIFEST_RECORD
from export.order import Order
from export.runtime import Library, PackagedRegion
from export.store import Entry, PackageStore, sha256
from recipes import Recipe

AOTI = Recipe(execution="aoti")
CPU = torch.device("cpu")


@pytest.fixture(scope="session")
def package(tmp_path_factory: pytest.TempPathFactory) -> Entry:
    """The package of tiny in float32 for `draw` of one image."""
    wanted = Order("tiny", AOTI, resolutions=((64, 64),), batches=(1,), text_lengths=(64,))
    ((entry, was_there),) = order.fill(wanted, tmp_path_factory.mktemp("packages"), CPU)
    assert not was_there
    return entry


@pytest.fixture
def damaged(package: Entry, tmp_path: Path) -> Path:
    """A copy of the package, .pt2 and .json, to damage."""
    for file in (package.path, package.path.with_suffix(".json")):
        shutil.copy(file, tmp_path / file.name)
    return tmp_path / package.path.name


def forge(package: Path, change: Callable[[dict[str, Any]], None], record: str | None = None) -> None:
    """Change a package's manifest, inside and beside, so that size and sha256 agree; or one of its records."""
    beside = json.loads(package.with_suffix(".json").read_text())
    change(beside["manifest"])
    with zipfile.ZipFile(package) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    (name,) = [name for name in records if name.endswith(MANIFEST_RECORD)]
    records[name] = json.dumps(beside["manifest"]).encode()
    with zipfile.ZipFile(package, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in records.items():
            archive.writestr(name, content)
    agree(package, beside)


def agree(package: Path, beside: dict[str, Any]) -> None:
    """Write the file beside a package with the package's real size and sha256."""
    beside |= {"size": package.stat().st_size, "sha256": sha256(package)}
    package.with_suffix(".json").write_text(json.dumps(beside))


@pytest.fixture(scope="session")
def library(package: Entry) -> Library:
    """The packages of a pipeline that may build none. Its weights are to be left as they are."""
    _, library = order.pipeline("tiny", AOTI, package.path.parent, CPU)
    return replace(library, store=PackageStore(package.path.parent, build=False))


@pytest.fixture(scope="session")
def after(library: Library) -> PackagedRegion:
    """The smallest of the packaged regions."""
    (found,) = [region for region in library.packaged if region.region.name == "after"]
    return found


def inputs_of_after(batch: int = 1, tokens: int = 16) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    return {
        "hidden_states": torch.randn(batch, tokens, 256, generator=random),
        "temb": torch.randn(batch, 256, generator=random),
    }
