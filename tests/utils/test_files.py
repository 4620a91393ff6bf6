"""Files are whole or not there."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from utils.errors import UsageError
from utils.files import ROOT, check_folder, check_image_file, check_target, replacing, write_text


def test_replaces_when_the_body_ends(tmp_path: Path) -> None:
    target = tmp_path / "a.json.gz"
    target.write_text("old")
    with replacing(target) as temporary:
        assert temporary.parent == tmp_path
        assert temporary.name.endswith(".json.gz")
        temporary.write_text("new")
        assert target.read_text() == "old"
    assert target.read_text() == "new"
    assert os.listdir(tmp_path) == ["a.json.gz"]


def test_an_exception_leaves_the_target(tmp_path: Path) -> None:
    target = tmp_path / "a.png"
    target.write_text("old")

    def write_half() -> None:
        with replacing(target) as temporary:
            temporary.write_text("half")
            raise RuntimeError("the disk is full")

    with pytest.raises(RuntimeError, match="the disk is full"):
        write_half()
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.png"]


@pytest.mark.parametrize("existed", [True, False])
def test_a_killed_process_leaves_the_target(tmp_path: Path, existed: bool) -> None:
    target = tmp_path / "a.json"
    if existed:
        target.write_text("old")
    program = (
        "import os, signal, sys; from pathlib import Path; from utils.files import replacing\n"
        "with replacing(Path(sys.argv[1])) as temporary:\n"
        "    temporary.write_text('half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, target], cwd=ROOT, check=False)
    assert done.returncode == -signal.SIGKILL
    assert target.exists() == existed
    assert not existed or target.read_text() == "old"
    beside = [name for name in os.listdir(tmp_path) if name != "a.json"]
    assert len(beside) == 1
    assert beside[0].startswith(".a-"), "hidden, and clearly of the target"


def test_a_new_file_has_ordinary_permissions(tmp_path: Path) -> None:
    write_text(tmp_path / "ours", "text")
    (tmp_path / "plain").write_text("text")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_check_folder(tmp_path: Path) -> None:
    check_folder(tmp_path / "a.png")
    assert os.listdir(tmp_path) == []
    with pytest.raises(UsageError, match="does not exist: create it with `mkdir -p"):
        check_folder(tmp_path / "no" / "a.png")
    with pytest.raises(UsageError, match="is a folder: give the name of a file"):
        check_folder(tmp_path)
    with pytest.raises(UsageError, match="is not writable"):
        check_folder(Path("/proc/a.png"))


def test_check_target(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    for good in (tmp_path, tmp_path / "new", tmp_path / "new" / "below"):
        check_target(good)
    for bad in (tmp_path / "file", tmp_path / "file" / "below", tmp_path / "nowhere"):
        with pytest.raises(UsageError, match="is not a folder: choose another one"):
            check_target(bad)
    with pytest.raises(UsageError, match="the folder /proc is not writable"):
        check_target(Path("/proc/new"))
    assert sorted(os.listdir(tmp_path)) == ["file", "nowhere"], "nothing was made"


def test_check_image_file(tmp_path: Path) -> None:
    for name in ("a.png", "a.JPG", "a.webp"):
        check_image_file(tmp_path / name)
    for name in ("a", "a.txt", "a.psd"):  # Pillow reads .psd, but can't write it
        with pytest.raises(UsageError, match="no image format is called"):
            check_image_file(tmp_path / name)
