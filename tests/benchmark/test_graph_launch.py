"""benchmark.graph_launch: refused without a GPU; on one, memsets are what costs the host."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from utils.files import ROOT


def run(path: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmark.graph_launch", "--output", str(path)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="of a machine without a GPU")
def test_refused_without_a_gpu(tmp_path: Path) -> None:
    ended = run(tmp_path / "out.json")
    assert ended.returncode == 2
    assert ended.stderr.splitlines()[-1] == "error: this is timed on a GPU, and there is none"
    assert not (tmp_path / "out.json").exists()


@pytest.mark.gpu
def test_three_graphs(tmp_path: Path) -> None:
    pytest.importorskip("cuda.bindings")
    ended = run(tmp_path / "out.json")
    assert ended.returncode == 0, ended.stderr
    rows = json.loads((tmp_path / "out.json").read_text())["graphs"]
    assert [row["graph"] for row in rows] == ["kernels in their place", "memsets", "memsets replaced"]
    assert all(row["host_us"]["median"] > 0 and row["gpu_ms"]["median"] > 0 for row in rows)
    assert len(ended.stdout.splitlines()) == 4
