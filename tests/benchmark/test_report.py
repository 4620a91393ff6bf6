"""Tables and pictures from result files alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from benchmark import report
from benchmark.runner import with_ratio
from recipes import Recipe, climb
from utils import results
from utils.errors import UserError

CPU = {"device_type": "cpu", "device": "A Processor (AVX2)", "cores": 2, "torch": "2.13.0+cpu", "power_limit_w": None}
RECIPES = {rung.name: rung.recipe for rung in climb(lambda rung: "not here" if rung.name == "fa3_fp8" else None)}
REQUEST = {"height": 64, "width": 128, "batch": 1, "steps": 4, "prompt": "a red circle", "seed": 42, "guidance": 0.0}


def result(name: str, parent: str | None, seconds: float, checkpoint: str = "tiny", **more: Any) -> dict[str, Any]:
    """A result file as the runner writes it."""
    recipe = RECIPES.get(name, RECIPES["bf16"])
    return {
        "recipe": {"name": name, "hash": recipe.hash, "parent": parent, **recipe.to_dict()},
        "applied": {},
        "lossless": name != "float8",
        "checkpoint": checkpoint,
        "request": REQUEST,
        "latency_s": {"runs": [seconds] * 3, "median": seconds, "p10": seconds, "p90": seconds},
        "stages_ms": {"text_encode": 1.0, "denoise": 4.0, "vae_decode": 20.5, "postprocess": 0.1},
        "denoise_step_ms": {"median": 12.25, "p10": 12.0, "p90": 13.0},
        "ratio_to_baseline": {"value": 2.0 / seconds, "low": 1.9 / seconds, "high": 2.1 / seconds, "baseline": "fp32"},
        "compile_s": 30.4 if name == "compiled" else 0.0,
        "start_s": 1.0,
        "warmup_calls": 2,
        "peak_memory_bytes": {"load": 2**29, "run": 3 * 2**29},
        "image_difference": {
            "max_abs": 0 if name == "fp32" else 9,
            "psnr_db": None if name == "fp32" else 31.25,
            "ssim": 1,
        },
        "environment": CPU,
        "command": "python run_benchmark.py --ladder",
        "started_at": "2026-01-01T00:00:00+00:00",
        **more,
    }


def skipped(name: str, parent: str, reason: str) -> dict[str, Any]:
    recipe = {"name": name, "hash": RECIPES[name].hash, "parent": parent, **RECIPES[name].to_dict()}
    about = {"recipe": recipe, "checkpoint": "tiny", "request": REQUEST, "environment": CPU, "command": "python"}
    return {**about, "skipped": reason}


LADDER = [
    result("fp32", None, 2.0),
    result("bf16", "fp32", 1.0),
    result("compiled", "bf16", 1.25),
    skipped("fa3_fp8", "compiled", "needs a cuda device | this is cpu"),
    result("float8", "compiled", 0.8),
]


def write(folder: Path, *found: dict[str, Any]) -> Path:
    for one in found:
        path = folder / results.file_name(one["recipe"]["name"], one["request"])
        results.write(path, one)
        Image.new("RGB", (32, 64), "red").save(path.with_suffix(".png"))
    return folder


def rows(table: str) -> dict[str, list[str]]:
    """The table's cells by rung."""
    lines = [line.replace(r"\|", "!") for line in table.splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert len({len(row) for row in cells}) == 1, "every row has as many cells as the head"
    return {row[0]: row[1:] for row in cells[1:]}


def test_table(tmp_path: Path) -> None:
    text = report.table(report.load(write(tmp_path, *reversed(LADDER))))
    assert text.splitlines()[0] == (
        "`tiny`, 128x64, 4 steps, batch 1, on A Processor (AVX2), 2 cores, torch 2.13.0+cpu, median of 3 runs."
    )
    table = rows(text)
    assert list(table) == ["fp32", "bf16", "compiled", "fa3_fp8", "float8"]
    assert table["fp32"][1:] == ["2.000", "1.00 (0.95 to 1.05)", "12.2", "20.5", "", "1.50", "equal", ""]
    assert table["compiled"][1:] == ["1.250", "1.60 (1.52 to 1.68)", "12.2", "20.5", "30", "1.50", "31.2", ""]
    assert table["float8"][-1] == "lossy"
    assert table["fa3_fp8"][1:] == [""] * 7 + ["skipped: needs a cuda device ! this is cpu"]


def test_random_weights_are_labelled(tmp_path: Path) -> None:
    rung = result("bf16", None, 1.0, checkpoint="random/flux-dev")
    assert "`random/flux-dev` (random weights: times only" in report.table([rung])
    assert "random weights" not in report.table(LADDER)
    from benchmark import plots

    plots.waterfall([rung], tmp_path / "ladder.svg")
    assert "random weights" in plots._title([rung])
    assert "random weights" not in plots._title(LADDER)


def test_other_sizes_and_single_recipes_stay_out(tmp_path: Path) -> None:
    small = {**REQUEST, "height": 32}
    write(tmp_path, *LADDER, result("max_autotune", "bf16", 0.1, request=small), result("bf16,cache=1", None, 0.1))
    (tmp_path / ".fp32@64x128-b1-s4-killed.json").write_text('{"schema":')
    assert [r["recipe"]["name"] for r in report.load(tmp_path)] == ["fp32", "bf16", "compiled", "fa3_fp8", "float8"]
    assert [r["recipe"]["name"] for r in report.load(tmp_path, results.size(small))] == ["max_autotune"]


def test_pictures(tmp_path: Path) -> None:
    write(tmp_path, *LADDER)
    report.write_folder(tmp_path)
    names = ("ladder.md", "ladder.svg", "ladder.png", "images.png")
    first = {name: (tmp_path / name).read_bytes() for name in names}
    report.write_folder(tmp_path)
    assert {name: (tmp_path / name).read_bytes() for name in names} == first, "the same files from the same results"
    assert first["ladder.md"].decode() == report.table(report.load(tmp_path))
    assert b"<svg" in first["ladder.svg"]
    for name in ("ladder.png", "images.png"):
        with Image.open(tmp_path / name) as image:
            assert min(image.size) > 100


def test_a_place_is_left_for_a_lost_picture(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from matplotlib.figure import Figure

    from benchmark import plots

    write(tmp_path, *LADDER)
    lost = results.file_name("bf16", REQUEST)
    (tmp_path / lost).with_suffix(".png").unlink()
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: figures.append(self))
    plots.image_strip(report.load(tmp_path), tmp_path, tmp_path / "images.png")
    panels = {axes.get_title(): axes for axes in figures[0].axes}
    assert [text.get_text() for text in panels["bf16"].texts] == ["not kept"]
    assert not panels["bf16"].images
    assert panels["fp32"].images
    assert not panels["fp32"].texts


def test_waterfall_draws_gains_losses_and_skips(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from matplotlib.figure import Figure

    from benchmark import plots

    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: figures.append(self))
    plots.waterfall(LADDER, tmp_path / "a.svg")
    (axes,) = figures[0].axes
    texts = [text.get_text() for text in axes.texts]
    assert texts == [
        "2.000 s   1.00x",
        "1.000 s   2.00x",
        "1.250 s   1.60x",
        "skipped: needs a cuda device | this is cpu",
        "0.800 s   2.50x",
    ]
    bars = [(round(bar.get_x(), 3), round(bar.get_width(), 3), bar.get_facecolor()) for bar in axes.patches]
    moved = [(x, width, color) for x, width, color in bars if x > 0 and width > 0]
    assert [(x, width) for x, width, _ in moved] == [(1.0, 1.0), (1.0, 0.25), (0.8, 0.45)]
    assert moved[0][2] == moved[2][2] != moved[1][2], "gained, lost, gained"


def test_waterfall_of_a_rung_whose_parent_was_not_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Against the last one that later rungs inherit."""
    from matplotlib.figure import Figure

    from benchmark import plots

    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: figures.append(self))
    rungs = [
        result("bf16", "fp32", 4.0), result("max_autotune", "compiled", 3.0), result("float8", "channels_last", 2.0),
    ]  # fmt: skip
    plots.waterfall(rungs, tmp_path / "a.svg")
    ends = [bar.get_x() + bar.get_width() for bar in figures[0].axes[0].patches if bar.get_x() > 0]
    assert ends == [4.0, 4.0, 4.0]


def test_nothing_measured_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no rung was measured"):
        report.table(report.load(tmp_path))
    write(tmp_path, skipped("fa3_fp8", "bf16", "not here"))
    with pytest.raises(UserError, match="no rung was measured"):
        report.table(report.load(tmp_path))


def test_only_what_is_between_the_markers_is_replaced(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    write(tmp_path / "cpu-2c" / "tiny", *LADDER)
    write(tmp_path / "h100" / "flux", result("bf16", None, 1.0))
    one, two = "<!-- results: cpu-2c/tiny -->", "<!-- results: h100/flux -->"
    end = "<!-- end of results -->"
    text = f"before\n{one}\nold | figures\n{end}\nbetween\n{two}\n{end}\nafter {end}\n"
    new = report.with_tables(text)
    tables = [report.table(report.load(tmp_path / name)) for name in ("cpu-2c/tiny", "h100/flux")]
    assert new == f"before\n{one}\n\n{tables[0]}\n{end}\nbetween\n{two}\n\n{tables[1]}\n{end}\nafter {end}\n"
    assert report.with_tables(new) == new
    sized = one.replace("tiny", "tiny@64x128-b1-s4")
    assert tables[0] in report.with_tables(f"{sized}\n{end}\n")
    assert report.with_tables("no markers") == "no markers"
    # A ladder's table, where another folder's results aren't there.
    other = f"{two.replace('flux', 'gone')}\nas it was\n{end}\n"
    alone = report.with_tables(f"{one}\n{end}\n{other}", tmp_path / "cpu-2c" / "tiny")
    assert alone == f"{one}\n\n{tables[0]}\n{end}\n{other}"


def test_readme_and_ladder_files_are_what_the_results_give() -> None:
    """Fails when README's tables or a folder's ladder.md have drifted from the committed results."""
    readme = report.README.read_text()
    assert "<!-- results: " in readme
    assert report.with_tables(readme) == readme, "run `python -m benchmark.report`"
    for path in results.RESULTS.glob("*/*/ladder.md"):
        assert path.read_text() == report.tables(path.parent), f"{path}: run `python -m benchmark.report`"


DEV, SCHNELL, KONTEXT = "random-flux-dev/", "random-flux-schnell/", "random-flux-kontext-dev/"
DEV_28 = [f"{DEV}{name}@1024x1024-b1-s28" for name in ("bf16", "int8_adaln", "loop_graph", "aoti")]
SCHNELL_4 = [f"{SCHNELL}{name}@1024x1024-b1-s4" for name in ("bf16", "int8_adaln", "loop_graph", "aoti")]
KONTEXT_28 = [f"{KONTEXT}{name}@1024x1024-b1-s28" for name in ("bf16", "int8_adaln", "loop_graph", "aoti")]
OF_DEV, OF_SCHNELL = f"{DEV}alone/int8_adaln", f"{SCHNELL}alone/int8_adaln"


@pytest.mark.parametrize(
    ("row", "files", "figure", "unit"),
    [
        ("dev, 28 steps", [DEV_28[0], DEV_28[3]], "latency_s", "s"),
        ("schnell, 4 steps", [SCHNELL_4[0], SCHNELL_4[1]], "latency_s", "s"),
        ("Kontext-dev, 28 steps", [KONTEXT_28[0], KONTEXT_28[1]], "latency_s", "s"),
        ("dev, 28 steps end to end", DEV_28, "latency_s", "s"),
        ("dev, one of these steps", DEV_28, "denoise_step_ms", "ms"),
        ("schnell, 4 steps end to end", SCHNELL_4, "latency_s", "s"),
        ("schnell, one of these steps", SCHNELL_4, "denoise_step_ms", "ms"),
        ("Kontext, 28 steps, an image of 1024x1024 edited", KONTEXT_28, "latency_s", "s"),
        ("dev, 4 images at once", [None, f"{OF_DEV}@1024x1024-b4-s28"], "latency_s", "s"),
        (
            "dev with the modulation's weights in host memory",
            [None, f"{OF_DEV},modulation=offloaded@1024x1024-b1-s28"],
            *("latency_s", "s"),
        ),
        (
            "dev, 768x1344",
            [None, f"{OF_DEV}@768x1344-b1-s28", None, f"{DEV}alone/aoti@768x1344-b1-s28"],
            *("latency_s", "s"),
        ),
        ("schnell, 4 images at once", [None, f"{OF_SCHNELL}@1024x1024-b4-s4"], "latency_s", "s"),
        ("schnell, 768x1344", [None, f"{OF_SCHNELL}@768x1344-b1-s4"], "latency_s", "s"),
        (
            "schnell with the modulation's weights in host memory",
            [None, f"{OF_SCHNELL},modulation=offloaded@1024x1024-b1-s4"],
            *("latency_s", "s"),
        ),
    ],
    ids=lambda value: value.replace(" ", "-") if isinstance(value, str) and "," in value else "",
)
def test_readmes_own_tables_are_what_the_results_give(
    row: str, files: list[str | None], figure: str, unit: str
) -> None:
    (line,) = [line for line in report.README.read_text().splitlines() if line.startswith(f"| {row} |")]
    cells = [cell.strip() for cell in line.split("|")[2:]]
    for cell, file in zip(cells, files, strict=False):
        if file is None:
            assert cell == ""
            continue
        median = results.read(results.RESULTS / f"h100-sxm-700w-torch2.11/{file}.json")[figure]["median"]
        assert cell.replace("**", "").startswith(f"{median:.{3 if unit == 's' else 1}f} {unit}"), file


def test_sizes_have_a_table_and_pictures_each(tmp_path: Path) -> None:
    batch = {**REQUEST, "batch": 4}
    alone = {**REQUEST, "steps": 9}
    write(tmp_path, *LADDER, result("bf16", None, 3.0, request=batch), result("float8", "bf16", 2.0, request=batch))
    write(tmp_path, {**skipped("fa3_fp8", "bf16", "not here"), "request": alone})
    assert report.sizes(tmp_path) == ["64x128-b1-s4", "64x128-b4-s4"]
    text = report.write_folder(tmp_path)
    first, second = text.split("\n\n`tiny`")
    assert first + "\n" == report.table(report.load(tmp_path))
    assert second.startswith(", 128x64, 4 steps, batch 4, on A Processor")
    assert list(rows("`tiny`" + second)) == ["bf16", "float8"]
    assert {f"{name}{size}" for name in ("ladder", "images") for size in (".png", "@64x128-b4-s4.png")} <= {
        path.name for path in tmp_path.iterdir()
    }


def test_baseline_timed_once_is_said(tmp_path: Path) -> None:
    measured, baseline = result("bf16", "fp32", 1.0), result("fp32", None, 2.0)
    killed = with_ratio(measured, "fp32", baseline)
    assert killed["ratio_to_baseline"]["baseline_timed"] == "at the beginning only"
    text = report.table([result("fp32", None, 2.0), killed])
    assert r"2.00 (2.00 to 2.00)\*" in text
    assert text.endswith("\n\\* The ladder was stopped before its baseline was timed a second time.\n")
    whole = with_ratio(measured, "fp32", baseline, baseline)
    assert whole["ratio_to_baseline"]["baseline_timed"] == "at the beginning and at the end"
    assert "stopped" not in report.table([result("fp32", None, 2.0), whole])


def test_rungs_whose_recipe_has_changed_are_marked() -> None:
    def before(name: str, **fields: Any) -> dict[str, Any]:
        then = Recipe.from_dict({**RECIPES[name].to_dict(), **fields})
        return result(name, "bf16", 1.5, recipe={"name": name, "hash": then.hash, "parent": "bf16", **then.to_dict()})

    assert "†" not in report.table(LADDER)
    text = report.table([*LADDER[:-1], before("float8", dtype="float32"), before("cuda_graph", dtype="float32")])
    assert [name for name in rows(text) if name.endswith(" †")] == ["float8 †", "cuda_graph †"]
    assert text.splitlines()[-1] == '† Measured when these rungs still had dtype="float32": float8, cuda_graph.'
    of_old = before("float8", dtype="float32")
    del of_old["recipe"]["dtype"], of_old["recipe"]["loop_graph"]  # as if these fields had come later
    text = report.table([*LADDER[:-1], of_old])
    assert text.splitlines()[-1] == '† Measured when these rungs still had dtype="float32": float8.'
