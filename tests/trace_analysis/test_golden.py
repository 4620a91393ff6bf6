"""Real traces that are kept in the repository, against a second, plain reckoning of the same figures.

record_golden.py recorded them: `cpu-*` of the embedded model, the others on an H100, all cut to one double and one
single block. The reckoning here shares no code with the analysis: it reads the JSON whole and goes through it event by
event.
"""

from __future__ import annotations

import gzip
import json
import random
import re
from collections import defaultdict
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from trace_analysis.host import source
from trace_analysis.load import load
from trace_analysis.report import Analysis

FOLDER = Path(__file__).parent / "traces"
TRACES = sorted(path.name.removesuffix(".json.gz") for path in FOLDER.glob("*.json.gz"))
GPU = ("kernel", "gpu_memcpy", "gpu_memset")
CALLS = ("cuda_runtime", "cuda_driver")
STEP = "denoising_step"


def nanoseconds(event: dict) -> tuple[int, int]:
    start, duration = int(Decimal(event["ts"]) * 1000), int(Decimal(event["dur"]) * 1000)
    return start, start + duration


def read(name: str) -> list[dict[str, Any]]:
    """The events with a duration, with their start and end in nanoseconds."""
    with gzip.open(FOLDER / f"{name}.json.gz", "rt") as file:
        found = json.load(file, parse_float=str)
    events = [event for event in found["traceEvents"] if event["ph"] == "X"]
    for event in events:
        event["start"], event["end"] = nanoseconds(event)
        event.setdefault("args", {})
    return events


def covered(intervals: list[tuple[int, int]], low: int, high: int) -> int:
    """Nanoseconds of low..high that lie in any of the intervals, by sweeping over their ends."""
    marks = []
    for start, end in intervals:
        start, end = max(start, low), min(end, high)
        if start < end:
            marks += [(start, 1), (end, -1)]
    depth = total = 0
    before = low
    for moment, change in sorted(marks):
        total += (moment - before) if depth else 0
        depth += change
        before = moment
    return total


@pytest.fixture(scope="module", params=TRACES)
def golden(request: pytest.FixtureRequest) -> tuple[str, list[dict], Analysis]:
    name = request.param
    return name, read(name), Analysis(load(FOLDER / f"{name}.json.gz"))


def test_traces_are_there_and_small() -> None:
    assert {"cpu-eager", "cpu-eager-sync-stacks", "cpu-planted"} <= set(TRACES)
    assert all((FOLDER / f"{name}.json.gz").stat().st_size <= 300_000 for name in TRACES)


def test_nothing_is_wrong_with_them(golden) -> None:
    _, events, analysis = golden
    assert analysis.report.findings == ()
    assert analysis.report.events == len(events)


def test_host_ranges(golden) -> None:
    _, events, analysis = golden
    zero = min(event["start"] for event in events)
    for spans, names in (
        (analysis.report.steps, (STEP,)),
        (analysis.report.stages, ("prompt_encoding", "decoding", "postprocessing")),
    ):
        wanted = sorted(
            (e["start"] - zero, e["end"] - e["start"], e["name"])
            for e in events
            if e["cat"] == "user_annotation" and e["name"] in names
        )
        assert [(s.host_start_ns, s.host_ns, s.name) for s in spans] == wanted
        assert wanted


def test_operators_own_time(golden) -> None:
    """Of each operator its time less all that lies within it on its thread."""
    name, events, analysis = golden
    host = ("cpu_op", "user_annotation", "python_function", *CALLS)
    by_thread = defaultdict(list)
    for event in events:
        if event["cat"] in host:
            by_thread[event["tid"]].append(event)
    own: dict[int, int] = {}
    for thread in by_thread.values():
        thread.sort(key=lambda e: (e["start"], -e["end"], e["args"].get("External id", -1), e["cat"]))
        for i, event in enumerate(thread):
            if event["cat"] == "cpu_op":
                inside = []
                for other in thread[i + 1 :]:
                    if other["start"] >= event["end"]:
                        break
                    inside.append((other["start"], other["end"]))
                length = event["end"] - event["start"]
                own[id(event)] = length - covered(inside, event["start"], event["end"])
    for span in (*analysis.report.steps, *analysis.report.stages):
        low = span.host_start_ns + min(event["start"] for event in events)
        wanted = sum(own[id(e)] for e in events if e["cat"] == "cpu_op" and low <= e["start"] < low + span.host_ns)
        assert span.operators_ns == wanted, name


def test_device_time(golden) -> None:
    """Windows, busy, idle, overlap and counts of every step, from launches by their correlation."""
    _, events, analysis = golden
    device = [e for e in events if e["cat"] in GPU]
    steps = sorted((e for e in events if e["cat"] == "user_annotation" and e["name"] == STEP), key=lambda e: e["start"])
    if not device:
        assert not analysis.report.has_gpu
        assert all(step.device is None for step in analysis.report.steps)
        return
    zero = min(event["start"] for event in events)
    calls: dict[int, int] = {}
    for event in events:
        if event["cat"] in CALLS:
            number = event["args"]["correlation"]
            calls[number] = min(calls.get(number, event["start"]), event["start"])
    launched = [calls[event["args"]["correlation"]] for event in device]
    intervals = [(e["start"], e["end"]) for e in device]
    previous = None
    for step, span in zip(steps, analysis.report.steps, strict=True):
        mine = [e for e, at in zip(device, launched, strict=True) if step["start"] <= at < step["end"]]
        if previous is None:
            earlier = [e["end"] for e, at in zip(device, launched, strict=True) if at < step["start"]]
            previous = max([step["start"], *earlier])
        end = max(e["end"] for e in mine)
        time = span.device
        assert time is not None
        assert (time.window_start_ns + zero, time.window_ns) == (previous, end - previous)
        busy = covered(intervals, previous, end)
        assert (time.busy_ns, time.idle_ns) == (busy, end - previous - busy)
        assert sum(time.kinds.values()) == sum(e["end"] - e["start"] for e in mine)
        assert time.kernels == sum(e["cat"] == "kernel" for e in mine)
        assert time.overlap_ns == sum(time.kinds.values()) + time.foreign_ns - busy
        within = [e["name"] for e in events if e["cat"] in CALLS and step["start"] <= e["start"] < step["end"]]
        assert time.graph_launches == sum("GraphLaunch" in n for n in within)
        assert time.kernel_launches == sum("LaunchKernel" in n or "LaunchCooperative" in n for n in within)
        previous = end


def test_gaps_add_up_and_are_explained(golden) -> None:
    name, _, analysis = golden
    gaps = analysis.report.gaps
    if gaps is None:
        assert name.startswith("cpu-")
        return
    assert gaps.idle_ns == sum(step.device.idle_ns for step in analysis.report.steps) == sum(gaps.causes.values())
    assert gaps.causes.get("unknown", 0) <= 0.05 * gaps.idle_ns


def test_order_of_events_does_not_matter(golden, tmp_path: Path) -> None:
    name, _, analysis = golden
    with gzip.open(FOLDER / f"{name}.json.gz", "rt") as file:
        found = json.load(file)
    random.Random(0).shuffle(found["traceEvents"])
    path = tmp_path / f"{name}.json.gz"
    with gzip.open(path, "wt", compresslevel=1) as file:
        json.dump(found, file)
    assert Analysis(load(path)).report == analysis.report


def test_stacks_name_the_schedulers_line() -> None:
    """The lookup of the first step's index, which on a GPU waits for everything queued."""
    analysis = Analysis(load(FOLDER / "cpu-eager-sync-stacks.json.gz"))
    calls = [i for i in range(len(analysis.trace)) if analysis.trace.name_of(i) in ("aten::nonzero", "aten::item")]
    assert len(calls) == 2
    for call in calls:
        found = source(analysis.host.frames(call))
        assert found.outside_torch is not None
        assert re.fullmatch(
            r"diffusers/schedulers/scheduling_flow_match_euler_discrete\.py\(\d+\): index_for_timestep",
            found.outside_torch,
        )
        assert found.own is not None
        assert re.fullmatch(r"record_golden\.py\(\d+\): call", found.own)
