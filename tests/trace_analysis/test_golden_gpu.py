"""Golden traces of a GPU: recorded on one by `record_golden.py`, read here."""

from __future__ import annotations

import json
from pathlib import Path

from trace_analysis.diff import diff
from trace_analysis.load import load
from trace_analysis.report import Analysis
from utils.files import ROOT

FOLDER = Path(__file__).parent / "traces"


def gpu(name: str) -> Analysis:
    return Analysis(load(FOLDER / f"{name}.json.gz"))


def test_a_run_with_the_schedulers_sync_names_its_line_and_one_without_has_none() -> None:
    found = gpu("eager-sync-stacks").report.syncs
    assert found
    assert all("index_for_timestep" in (sync.outside_torch or "") for sync in found)
    assert {"aten::nonzero", "aten::item"} & {sync.operators[0] for sync in found}
    assert gpu("eager-sync").report.syncs
    for name in ("eager", "compiled", "graph", "compiled-graph"):
        assert gpu(name).report.syncs == (), name


def test_planted_causes_are_named() -> None:
    """A sleep of 30 ms in step 1's range, `.item()` in step 2's, a recompilation in step 3's."""
    gaps = gpu("planted").report.gaps
    sleep = max((gap for gap in gaps.longest if gap.step == 1), key=lambda gap: gap.time_ns)
    assert max(sleep.causes, key=lambda cause: sleep.causes[cause]) == "Python"
    assert any(gap.step == 2 and gap.after_sync == "aten::item" for gap in gaps.longest)
    recompiled = max((gap for gap in gaps.longest if gap.step == 3), key=lambda gap: gap.time_ns)
    assert max(recompiled.causes, key=lambda cause: recompiled.causes[cause]) == "recompilation"
    with_stacks = gpu("planted-stacks").report
    sleep = max((gap for gap in with_stacks.gaps.longest if gap.step == 1), key=lambda gap: gap.time_ns)
    assert "sleep" in (sleep.doing or "")
    assert any("callback" in (sync.own or "") for sync in with_stacks.syncs)


def test_shapes_of_a_graph_from_the_trace_without() -> None:
    for graph, plain in (("graph", "eager"), ("compiled-graph", "compiled")):
        report = Analysis(load(FOLDER / f"{graph}.json.gz"), shapes_from=gpu(plain)).report
        assert {"gemm", "attention"} <= {row.kind for row in report.rates.rows}
        assert 1 < report.rates.kernels_above < 10
        assert all(0 < row.of_peak < 1 for row in report.rates.rows if row.of_peak is not None and row.kind == "gemm")


def test_diff_of_eager_and_compiled() -> None:
    found = diff(gpu("eager"), gpu("compiled-graph"))
    total = sum(c.change_ns for c in (*found.kinds, found.foreign, found.idle)) - found.overlap.change_ns
    assert total == found.window.change_ns < 0


def test_readme_quotes_the_committed_diff_of_full_size_dev_which_adds_up() -> None:
    name = "random-flux-dev-bf16-eager-to-fastest"
    folder = ROOT / "results" / "h100-sxm-700w-torch2.11" / "traces"
    first = (folder / f"{name}.md").read_text().partition("## Kernels that went")[0]
    table = "\n".join(line for line in first.splitlines() if line.startswith("|"))
    assert table.count("\n") > 5
    assert table in (ROOT / "README.md").read_text()
    found = json.loads((folder / f"{name}.json").read_text())

    def change(part: dict[str, int]) -> int:
        return part["after_ns"] - part["before_ns"]

    parts = (*found["kinds"], found["foreign"], found["idle"])
    assert sum(map(change, parts)) - change(found["overlap"]) == change(found["window"]) < 0


def test_few_kernels_are_of_no_known_kind() -> None:
    for name in ("eager", "compiled", "compiled-graph", "float8-compiled"):
        kinds = {row.kind: row.share for row in gpu(name).report.kinds}
        assert kinds.get("other", 0) < 0.02, name
    assert any(row.kind == "gemm fp8" for row in gpu("float8-compiled").report.kinds)
