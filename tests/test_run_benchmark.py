"""run_benchmark.py: one recipe, or the ladder, each rung in a fresh process, resumably."""

from __future__ import annotations

import gzip
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from recipes import ladder, named
from trace_analysis.load import load
from trace_analysis.report import report
from utils import environment, results
from utils.files import ROOT

SMALL = ("--checkpoint", "tiny", "--steps", 1, "--height", 64, "--width", 64, "--runs", 2)
SCHEMA_1 = {
    "schema": None,
    "recipe": {"name", "hash", "parent", *named()["bf16"].to_dict()},
    "applied": {"dtype", "scheduler_sync_removal"},
    "checkpoint": None,
    "request": {"height", "width", "steps", "guidance", "batch", "seed", "prompt"},
    "latency_s": {"runs", "median", "p10", "p90"},
    "stages_ms": {"text_encode", "denoise", "vae_decode", "postprocess"},
    "denoise_step_ms": {"median", "p10", "p90"},
    "ratio_to_baseline": {"value", "low", "high", "baseline"},
    "compile_s": None,
    "start_s": None,
    "warmup_calls": None,
    "peak_memory_bytes": {"load", "run"},
    "image_difference": {"max_abs", "psnr_db", "ssim"},
    "environment": {
        *("device", "power_limit_w", "driver", "torch", "cuda", "cudnn", "triton", "diffusers", "transformers"),
        *("torchao", "python", "os", "commit", "clean", "before", "after"),
    },
    "command": None,
    "started_at": None,
}


def assert_schema_1(result: dict[str, Any]) -> None:
    for key, inner in SCHEMA_1.items():
        assert key in result, key
        assert inner is None or result[key] is None or inner <= set(result[key]), key


def folder(root: Path) -> Path:
    return results.folder(root, environment.capture(torch.device("cpu")), "tiny")


def rung(root: Path, name: str) -> dict[str, Any]:
    return results.read(folder(root) / f"{name}@64x64-b1-s1.json")


def climb_only(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """The ladder with these rungs alone."""
    monkeypatch.setattr(ladder, "LADDER", tuple(change for change in ladder.LADDER if change.__name__ in names))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--runs", "0"], "--runs 0: give at least 1"),
        (["--runs", "-2"], "--runs -2: give at least 1"),
        (["--steps", "0"], "--steps 0: give at least 1"),
        (["--height", "63"], "--height 63 is not a positive multiple of 16"),
        (["--recipe", "bf16", "--trace-file", "no/trace.json"], "the folder no does not exist"),
        (["--recipe", "bf16", "--output", "no/image.png"], "the folder no does not exist"),
        (["--recipe", "bf16", "--output", "image.txt"], "no image format is called '.txt'"),
        (["--ladder", "--recipe", "bf16"], "are for one recipe: leave --ladder out"),
        (["--ladder", "--output", "a.png"], "are for one recipe: leave --ladder out"),
        (["--ladder", "--trace-file", "a.json"], "are for one recipe: leave --ladder out"),
        (["--ladder", "--baseline", "fp16"], "unknown baseline 'fp16': did you mean "),
        (["--ladder", "--rungs", "bf16", "int4"], "unknown rung 'int4': it is one of fp32, bf16"),
        (["--ladder", "--rungs", "bf16,int4"], "unknown rung 'int4': it is one of fp32, bf16"),
        (["--ladder", "--rungs", "bf61"], "unknown rung 'bf61': did you mean bf16? It is one of fp32, bf16"),
        (["--recipe", "bf16", "--rungs", "bf16"], "--rungs: of the ladder only, add --ladder"),
        (["--ladder", "--baseline", "fa3_fp8"], "the baseline fa3_fp8 can't run here: attention=fa3_fp8 needs a cuda"),
        (["--recipe", "bf16,attention=fa3_fp8"], "the nearest recipe that runs here: --recipe bf16"),
        (["--frobnicate"], "unrecognized arguments: --frobnicate"),
    ],
)
def test_bad_usage(
    main: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    done = main("run_benchmark", *SMALL, "--results", tmp_path / "results", *arguments)
    assert words in done.error()
    assert len(done.lines) == 1
    assert done.code == 2
    assert os.listdir(tmp_path) == []


@pytest.mark.slow
def test_one_recipe_with_trace_and_image(script: Callable, tmp_path: Path) -> None:
    """As a user runs it: relative paths, from a folder with a `utils` of its own, by flux-fast's flags."""
    (tmp_path / "utils").mkdir()
    (tmp_path / "utils" / "__init__.py").write_text("raise RuntimeError('not ours')")
    flags = "--ckpt tiny --num_inference_steps 2 --compile_export_mode disabled --disable_fused_projections"
    more = "--disable_fa3 --disable_quant --disable_inductor_tuning_flags --trace-file trace.json.gz --trace-stacks"
    size = "--height 64 --width 48 --runs 3 --results results --output-file image.png"
    done = script("run_benchmark.py", *f"{flags} {more} {size}".split(), cwd=tmp_path)
    assert done.code == 0, done.err
    name = "no_scheduler_sync,channels_last=true"
    assert done.out.splitlines()[0] == f"tiny on cpu, recipe {name} (from flux-fast's flags)"
    of_run, result_line, trace_line = done.out.splitlines()[-3:]
    assert of_run.startswith(f"{name}: ")
    assert result_line.startswith("result: results/")
    assert trace_line == "trace: read it with `python -m trace_analysis report trace.json.gz`"
    assert Image.open(tmp_path / "image.png").size == (48, 64)
    assert sorted(os.listdir(tmp_path)) == ["image.png", "results", "trace.json.gz", "utils"]

    path = folder(tmp_path / "results") / "alone" / f"{name}@64x48-b1-s2.json"
    result = results.read(path)
    assert_schema_1(result)
    assert path.with_suffix(".png").exists()
    assert result["applied"] == {
        "dtype": "bfloat16",
        "scheduler_sync_removal": "no sync",
        "channels_last": "vae",
    }
    latency = result["latency_s"]
    assert len(latency["runs"]) == 3
    assert result["denoise_step_timed"] == "alone"
    assert min(latency["runs"]) <= latency["median"] <= max(latency["runs"])
    assert 2 <= result["warmup_calls"] <= 10
    assert result["compile_s"] == 0
    assert result["compile_phases_s"] == {}
    assert 0 < result["apply_s"] < result["start_s"]
    assert result["ratio_to_baseline"] is None
    assert result["image_difference"] is None, "there was no baseline to compare with"
    assert all(100 * 2**20 < value < 8 * 2**30 for value in result["peak_memory_bytes"].values())
    assert result["command"].startswith("python run_benchmark.py --ckpt tiny")
    assert str(tmp_path) not in path.read_text()
    # The stages make up the call, but for a few lines of Python and the clock's noise.
    assert 0.3 * 1000 * latency["median"] < sum(result["stages_ms"].values()) < 3 * 1000 * latency["median"]

    with gzip.open(tmp_path / "trace.json.gz", "rt") as file:
        events = json.load(file)["traceEvents"]
    ranges = sorted((e["ts"], e["name"]) for e in events if e.get("cat") == "user_annotation")
    steps = ["denoising_step", "scheduler_step"] * 2
    assert [name for _, name in ranges] == ["prompt_encoding", *steps, "decoding", "postprocessing"]
    assert any(e.get("cat") == "python_function" for e in events), "stacks"
    assert any("Input Dims" in e.get("args", {}) for e in events), "shapes"


@pytest.mark.gpu
def test_loop_of_one_launch(script: Callable, tmp_path: Path) -> None:
    recipe, trace = "no_scheduler_sync,cuda_graph=true,loop_graph=true", tmp_path / "trace.json"
    options = ("--steps", 4, "--recipe", recipe, "--trace-file", trace, "--results", tmp_path / "results")
    done = script("run_benchmark.py", *SMALL, *options)
    assert done.code == 0, done.err
    (path,) = (tmp_path / "results").glob("*/*/alone/*.json")
    result = results.read(path)
    assert_schema_1(result)
    assert result["denoise_step_timed"] == "with its loop, by the number of steps"
    assert result["stages_ms"]["denoise"] == pytest.approx(4 * result["denoise_step_ms"]["median"], rel=1e-3)
    events = json.loads(trace.read_text())["traceEvents"]
    ranges = sorted((e["ts"], e["name"]) for e in events if e.get("cat") == "user_annotation")
    assert [name for _, name in ranges] == ["prompt_encoding", "denoising_loop", "decoding", "postprocessing"]
    found = report(load(trace), "denoising_loop")
    assert [span.device.graph_launches for span in found.steps if span.device] == [1]
    assert "no_steps" not in {finding.name for finding in found.findings}


@pytest.mark.slow
def test_plain_trace_without_stacks(script: Callable, tmp_path: Path) -> None:
    options = ("--recipe", "bf16", "--trace-file", tmp_path / "trace.json", "--results", tmp_path / "results")
    done = script("run_benchmark.py", *SMALL, *options)
    assert done.code == 0
    (path,) = (tmp_path / "results").glob("*/*/alone/*.json")
    assert done.out.splitlines()[-2:] == [
        f"result: {path}",
        f"trace: read it with `python -m trace_analysis report {tmp_path / 'trace.json'}`",
    ]
    assert "profiler" not in done.err
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert not any(e.get("cat") == "python_function" for e in events)


@pytest.mark.slow
def test_failure_in_the_fresh_process_is_one_line(script: Callable, tmp_path: Path) -> None:
    options = ("--recipe", "bf16,execution=aoti", "--use-cached-model", "--cache-dir", tmp_path / "empty")
    done = script("run_benchmark.py", *SMALL, *options, "--results", tmp_path / "results")
    assert "(region before): run once without --use-cached-model, or build one with `python -m" in done.error()
    assert done.code == 1
    assert not (tmp_path / "results").exists()


@pytest.mark.slow
def test_ladder_is_resumable(main: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    climb_only(monkeypatch, "fp32", "bf16", "fa3_fp8", "float8", "channels_last")
    climb = ("run_benchmark", *SMALL, "--ladder", "--results", tmp_path)
    done = main(*climb)
    assert done.code == 0, done.err
    assert [line for line in done.out.splitlines() if line.startswith("fp32: the baseline")] == [
        "fp32: the baseline, first time",
        "fp32: the baseline, second time",
    ]
    assert "fa3_fp8: skipped, attention=fa3_fp8 needs a cuda device, this is cpu" in done.out
    assert "float8: skipped, float8 on a CPU is emulated" in done.out
    measured = {name: rung(tmp_path, name) for name in ("fp32", "bf16", "channels_last")}
    for name, result in measured.items():
        assert_schema_1(result)
        ratio = result["ratio_to_baseline"]
        assert ratio["baseline"] == "fp32"
        assert ratio["low"] <= ratio["value"] <= ratio["high"]
        assert len(ratio["baseline_runs"]) == 2 * 2, "of both times"
        assert ratio["baseline_timed"] == "at the beginning and at the end"
        assert ratio["baseline_runs"][:2] == measured["fp32"]["latency_s"]["runs"]
        assert result["recipe"]["parent"] == {"fp32": None, "bf16": "fp32", "channels_last": "bf16"}[name]
    assert measured["fp32"]["image_difference"]["max_abs"] == 0
    assert measured["bf16"]["image_difference"]["max_abs"] > 0
    assert measured["channels_last"]["recipe"]["dtype"] == "bfloat16"
    assert measured["channels_last"]["recipe"]["attention"] == "native"
    assert measured["channels_last"]["recipe"]["quantization"] == "none"
    assert rung(tmp_path, "fa3_fp8")["skipped"].startswith("attention=fa3_fp8 needs a cuda device")
    assert rung(tmp_path, "float8")["recipe"]["parent"] == "channels_last"
    assert {"ladder.md", "ladder.svg", "ladder.png", "images.png"} <= set(os.listdir(folder(tmp_path)))
    assert (folder(tmp_path) / "ladder.md").read_text() in done.out

    before = {path: path.read_text() for path in results.files(folder(tmp_path))}
    done = main(*climb)
    assert done.code == 0
    assert re.search(r"nothing to measure: .*last measured \d{4}-\d\d-\d\d, .*--again measures anew", done.out)
    assert "the baseline" not in done.out
    assert {path: path.read_text() for path in results.files(folder(tmp_path))} == before

    (folder(tmp_path) / "channels_last@64x64-b1-s1.json").unlink()
    done = main(*climb)
    assert done.code == 0
    assert done.out.count("fp32: the baseline, ") == 2
    assert "bf16: " not in done.out.partition("|")[0]
    changed = {path.name.partition("@")[0] for path, text in before.items() if path.read_text() != text}
    assert changed == {"channels_last"}


@pytest.mark.slow
def test_ladder_in_two_parts_with_reports(main: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    climb_only(monkeypatch, "fp32", "bf16", "no_scheduler_sync")
    climb = ("run_benchmark", *SMALL, "--ladder", "--results", tmp_path, "--trace-reports")
    done = main(*climb, "--seconds", 0.001)
    assert done.code == 0, done.err
    assert "no_scheduler_sync: left for the next time, 0 s are over" in done.out
    assert [path.name for path in results.files(folder(tmp_path))] == ["fp32@64x64-b1-s1.json"]
    assert rung(tmp_path, "fp32")["ratio_to_baseline"]["baseline_timed"] == "at the beginning and at the end"
    assert main(*climb).code == 0
    names = ("bf16", "fp32", "no_scheduler_sync")
    assert [path.name for path in results.files(folder(tmp_path))] == [f"{name}@64x64-b1-s1.json" for name in names]
    reports = sorted((folder(tmp_path) / "traces").iterdir())
    assert [path.name for path in reports] == [f"{name}@64x64-b1-s1.md" for name in names]
    for path, name in zip(reports, names, strict=True):
        assert path.read_text().startswith(f"# {name}, one call\n"), name
        assert "## Denoising steps" in path.read_text()


@pytest.mark.slow
def test_some_rungs_of_the_ladder(main: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On top of those below them, measured or not, and against a baseline that is kept once; what isn't asked for isn't
    even skipped."""
    climb_only(monkeypatch, "fp32", "bf16", "no_scheduler_sync", "channels_last", "fa3_fp8")
    climb = ("run_benchmark", *SMALL, "--ladder", "--results", tmp_path, "--rungs", "no_scheduler_sync")
    done = main(*climb)
    assert done.code == 0, done.err
    assert "fa3_fp8" not in done.out
    names = [f"{name}@64x64-b1-s1.json" for name in ("fp32", "no_scheduler_sync")]
    assert [path.name for path in results.files(folder(tmp_path))] == names
    baseline = rung(tmp_path, "fp32")
    assert main(*climb, "--again").code == 0
    assert rung(tmp_path, "fp32") == baseline
    measured = rung(tmp_path, "no_scheduler_sync")
    assert (measured["recipe"]["parent"], measured["recipe"]["dtype"]) == ("bf16", "bfloat16")
    assert measured["ratio_to_baseline"]["baseline"] == "fp32"
    assert len(measured["ratio_to_baseline"]["baseline_runs"]) == 4, "of both times"


@pytest.mark.slow
def test_failing_rung_is_recorded_and_not_inherited(
    main: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def aoti_first(parent):
        """Fails: its packages aren't there, and mustn't be built."""
        return ladder.aoti(parent)

    monkeypatch.setattr(ladder, "LADDER", (ladder.fp32, ladder.bf16, aoti_first, ladder.no_scheduler_sync))
    cache = ("--use-cached-model", "--cache-dir", tmp_path / "empty")
    done = main("run_benchmark", *SMALL, "--ladder", "--baseline", "bf16", "--results", tmp_path / "results", *cache)
    assert done.error() == "error: failed rungs: aoti_first"
    assert done.code == 1
    failed, after = (rung(tmp_path / "results", name) for name in ("aoti_first", "no_scheduler_sync"))
    assert failed["skipped"].startswith("failed: no package in ")
    assert failed["recipe"]["execution"] == "aoti"
    assert after["recipe"]["parent"] == "bf16"
    assert after["recipe"]["execution"] == "eager"
    assert after["ratio_to_baseline"]["baseline"] == "bf16"
    assert not (folder(tmp_path / "results") / "fp32@64x64-b1-s1.json").exists(), "below the baseline"


@pytest.mark.slow
def test_killed_in_the_middle(tmp_path: Path) -> None:
    command = [sys.executable, ROOT / "run_benchmark.py", *SMALL, "--ladder", "--results", tmp_path]
    with subprocess.Popen([*map(str, command)], start_new_session=True, stderr=subprocess.DEVNULL) as process:
        until = time.monotonic() + 120
        while not (folder(tmp_path) / "fp32@64x64-b1-s1.json").exists() and time.monotonic() < until:
            time.sleep(0.02)
        time.sleep(3)  # in the middle of bf16
        os.killpg(process.pid, signal.SIGKILL)
    found = results.files(folder(tmp_path))
    assert "fp32@64x64-b1-s1.json" in [path.name for path in found]
    for path in found:
        assert_schema_1(results.read(path))
        assert results.read(path)["ratio_to_baseline"]["baseline_timed"] == "at the beginning only"
        Image.open(path.with_suffix(".png")).load()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--again",), "--again: of the ladder only, add --ladder"),
        (("--baseline", "bf16"), "--baseline: of the ladder only, add --ladder"),
        (("--trace-reports",), "--trace-reports: of the ladder only, add --ladder"),
        (("--seconds", 5, "--rungs", "bf16"), "--rungs and --seconds: of the ladder only, add --ladder"),
        (("--trace-stacks",), "--trace-stacks needs --trace-file"),
        (("--ladder", "--disable_quant"), "recipes, --trace-file and --output are for one recipe"),
        (("--ladder", "--recipe", "bf16"), "recipes, --trace-file and --output are for one recipe"),
        (("--results", __file__), "is not a folder: choose another one"),
    ],
)
def test_options_without_effect_are_refused(main: Callable, options: tuple[str, ...], message: str) -> None:
    done = main("run_benchmark", *SMALL, *options)
    assert done.code == 2
    assert message in done.error()
