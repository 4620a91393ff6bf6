"""Series of measurements: what fails, is skipped or comes too late leaves the others alone."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmark import series
from benchmark.series import Measurement
from utils.errors import UsageError

CPU = torch.device("cpu")


def arguments(output: Path, *more: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    series.add_options(parser)
    return parser.parse_args(["--output", str(output), *more])


def line(row: dict[str, Any]) -> str:
    return f"{row['kernel']} {row['ms']}" if "ms" in row else row["kernel"]


def test_survives_failure_and_saves_as_it_goes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out.json"
    saved = []

    def fail() -> dict[str, Any]:
        saved.append(json.loads(output.read_text())["kernels"])
        raise RuntimeError("no engine\nat all")

    measurements = [
        Measurement({"kernel": "one"}, lambda: {"ms": 1.5}),
        Measurement({"kernel": "two"}, fail),
        Measurement({"kernel": "three"}, fail, skipped="needs a cuda device"),
        Measurement({"kernel": "four"}, lambda: {"ms": 2.5}),
    ]
    asked = arguments(output, "--commit", "abc")
    rows = series.run("kernels", measurements, "kernel ms", line, asked, CPU, about={"checkpoint": "tiny"})
    assert saved == [[{"kernel": "one", "ms": 1.5}]]
    result = json.loads(output.read_text())
    assert result["kernels"] == [
        {"kernel": "one", "ms": 1.5},
        {"kernel": "two", "failed": "RuntimeError: no engine"},
        {"kernel": "three", "skipped": "needs a cuda device"},
        {"kernel": "four", "ms": 2.5},
    ]
    assert result["kernels"] == rows
    assert result["schema"] == 1
    assert result["checkpoint"] == "tiny"
    assert result["environment"]["device_type"] == "cpu"
    printed = capsys.readouterr()
    table = ["kernel ms", "one 1.5", "two  failed: RuntimeError: no engine", "three  needs a cuda device", "four 2.5"]
    assert printed.out.splitlines() == table
    assert printed.err.splitlines() == table[1:]
    assert (tmp_path / "out.txt").read_text() == printed.out


def test_begins_nothing_after_its_time(tmp_path: Path) -> None:
    output = tmp_path / "out.json"

    def slow() -> dict[str, Any]:
        time.sleep(2.1)
        return {"ms": 1.0}

    both = [Measurement({"kernel": name}, slow) for name in "ab"]
    series.run("kernels", both, "", line, arguments(output, "--seconds", "2"), CPU)
    a, b = json.loads(output.read_text())["kernels"]
    assert a["ms"] == 1.0
    assert b["skipped"] == "no time left of 2 s"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_refuses_a_machine_without_a_gpu(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="timed on a GPU, and there is none"):
        series.check(arguments(tmp_path / "out.json"))
