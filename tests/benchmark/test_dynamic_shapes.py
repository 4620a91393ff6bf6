"""What a range of sizes costs: one region measured for real, the command's file and table, and what is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from benchmark import dynamic_shapes
from benchmark.dynamic_shapes import in_turns, line, measure
from export import order, regions
from recipes import Recipe

CPU = torch.device("cpu")
COMMAND = ("fp32,execution=aoti", "--checkpoint", "tiny", "--device", "cpu")


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["dynamic_shapes", *COMMAND, *map(str, arguments)])
    dynamic_shapes.main()


@pytest.mark.slow
def test_one_region_at_two_sizes(tmp_path: Path) -> None:
    _, library = order.pipeline("tiny", Recipe(execution="aoti"), tmp_path, CPU)
    after = next(region for region in library.packaged if region.region is regions.AFTER)
    calls = [(after, {"hidden_states": torch.randn(1, n, 256), "temb": torch.randn(1, 256)}) for n in (9, 24)]
    with torch.inference_mode(False):
        found = measure(library, calls, 5, CPU)
    assert found["ranges"] == {"image_tokens": {"smallest": 9, "largest": 24}}
    assert [at["sizes"] for at in found["at"]] == [{"image_tokens": 9}, {"image_tokens": 24}]
    for at in found["at"]:
        assert 0 < at["ratio"]["low"] <= at["ratio"]["value"] <= at["ratio"]["high"]
        for name in ("fixed", "dynamic"):
            assert 0 < at["ms"][name]["p10"] <= at["ms"][name]["median"]
            assert 0 <= at["relative_error"][name] < 1e-5
    row = line({"region": "after", **found})
    assert [text.split()[0] for text in row.splitlines()] == ["after", "9", "24"]
    json.dumps(found)


def test_runs_take_turns() -> None:
    order: list[str] = []
    ms = in_turns({name: lambda name=name: order.append(name) for name in ("a", "b")}, 4, CPU)  # type: ignore[misc]
    assert {name: len(of_run) for name, of_run in ms.items()} == {"a": 4, "b": 4}
    assert len(order) == 28
    assert "".join(order[:8]) == "baabbaab"


def test_file_and_table(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Without time for any region: the rows are there, with the reason."""
    output = tmp_path / "out.json"
    run(monkeypatch, "--resolutions", "64x64,96x64", "--text-lengths", 64, "--seconds", 0, "--output", output)
    found = json.loads(output.read_text())
    assert (found["recipe"]["name"], found["checkpoint"], found["batch"]) == ("fp32,execution=aoti", "tiny", 1)
    assert {row["region"]: row["modules"] for row in found["regions"]} == {
        "before": 1,
        "double_block": 2,
        "single_block": 4,
        "after": 1,
        "vae_decoder": 1,
    }
    assert all(row["skipped"] == "no time left of 0 s" for row in found["regions"])
    assert capfd.readouterr().out.splitlines()[1] == "before  no time left of 0 s"


def test_some_regions(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    output = tmp_path / "out.json"
    sizes = ("--resolutions", "64x64,96x64", "--text-lengths", 64, "--regions", "after", "vae_decoder")
    run(monkeypatch, *sizes, "--seconds", 0, "--output", output)
    assert [row["region"] for row in json.loads(output.read_text())["regions"]] == ["after", "vae_decoder"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--resolutions", "64x64", "--text-lengths", "64"), "give the smallest and the largest size"),
        (
            ("--resolutions", "60x64,64x64", "--text-lengths", "64"),
            ": 60 is not a positive multiple of 16: try 48 or 64",
        ),
        (("--resolutions", "64x64,96x64", "--text-lengths", "64", "--repeats", "0"), "--repeats 0: give at least 1"),
    ],
)
def test_bad_usage(
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
    arguments: tuple[str, ...],
    words: str,
) -> None:
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, *arguments, "--output", tmp_path / "a.json")
    out, err = capfd.readouterr()
    assert (ended.value.code, out) == (2, "")
    assert words in err
    assert list(tmp_path.iterdir()) == []
