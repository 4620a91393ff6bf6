"""The trace reader: on a real trace of the embedded model, on traces worked out by hand, and on bad files."""

from __future__ import annotations

import gzip
import json
import random
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch

from trace_analysis.kernels import KernelTime
from trace_analysis.load import Event, load
from trace_analysis.operators import OperatorTime, operator_times, own_times
from trace_analysis.ranges import NAMES, RangeTime
from trace_analysis.report import report
from utils import checkpoints, ranges
from utils.errors import UsageError
from utils.files import ROOT


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "trace_analysis", *map(str, arguments)]
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True)


def event(name: str, start: float, duration: float, category: str = "cpu_op", thread: int = 1, **more: Any) -> dict:
    """A complete event; times in microseconds, as in the file."""
    place = {"pid": 7, "tid": thread, "ts": start, "dur": duration}
    return {"ph": "X", "cat": category, "name": name, **place, "args": more}


def kernel(name: str, start: float, duration: float, correlation: int) -> dict:
    return event(name, start, duration, "kernel", correlation=correlation)


def write(path: Path, events: list[dict]) -> Path:
    path.write_text(json.dumps({"schemaVersion": 1, "traceEvents": events}))
    return path


# Two steps of 100 and 90 us. In the first, on thread 1: linear (40) calls addmm (30), which calls copy (5) and
# copy (7); mul (20) follows at once. On thread 2, at the same time as linear: add (35), which calls copy (4).
# In the second: mul (10). Outside: encoding with copy (50).
BY_HAND = [
    event("prompt_encoding", 0, 90, "user_annotation"),
    event("aten::copy_", 10, 50),
    event("denoising_step", 100, 100, "user_annotation"),
    event("aten::linear", 110, 40),
    event("aten::addmm", 115, 30),
    event("aten::copy_", 116, 5),
    event("aten::copy_", 122, 7),
    event("aten::mul", 150, 20),
    event("aten::add", 112, 35, thread=2),
    event("aten::copy_", 120.5, 4, thread=2),
    event("denoising_step", 200, 90, "user_annotation"),
    event("aten::mul", 210, 10),
    event("not an operator", 211, 3, "python_function"),
    event("decoding", 300, 12.345, "user_annotation"),
    {"ph": "M", "name": "process_name", "pid": 7, "args": {"name": "python"}},
    {"ph": "i", "name": "Iteration Start", "pid": 7, "ts": 0, "s": "g"},
]


def test_figures_of_a_trace_worked_out_by_hand(tmp_path: Path) -> None:
    found = report(load(write(tmp_path / "trace.json", BY_HAND)))
    assert found.ranges == (
        RangeTime("prompt_encoding", 1, 90_000, 90_000),
        RangeTime("denoising_step", 2, 190_000, 95_000),
        RangeTime("decoding", 1, 12_345, 12_345),
    )
    assert found.scope == "denoising_step"
    assert found.operators == (
        OperatorTime("aten::add", 1, 31_000),
        OperatorTime("aten::mul", 2, 30_000),
        OperatorTime("aten::addmm", 1, 18_000),
        OperatorTime("aten::copy_", 3, 16_000),
        OperatorTime("aten::linear", 1, 10_000),
    )
    assert found.kernels is None
    assert found.kernels_without_launch is None


def test_order_of_events_does_not_matter(tmp_path: Path) -> None:
    wanted = report(load(write(tmp_path / "trace.json", BY_HAND)))
    for seed in range(5):
        shuffled = random.Random(seed).sample(BY_HAND, len(BY_HAND))
        assert report(load(write(tmp_path / "trace.json", shuffled))) == wanted


def test_own_times_of_a_thread_add_up_to_the_time_it_was_busy() -> None:
    rng = random.Random(3)

    def nested(start: int, end: int, depth: int) -> list[Event]:
        """An event that fills start..end, and others inside it."""
        inside, at = [Event("cpu_op", f"depth {depth}", start, end - start, 7, 1, {})], start
        while depth < 4 and at < end and rng.random() < 0.8:
            first = rng.randint(at, end)
            at = rng.randint(first, end)
            inside += nested(first, at, depth + 1)
        return inside

    for _ in range(200):
        events = nested(0, 10_000, 0)
        rng.shuffle(events)
        times = list(own_times(events))
        assert sum(own for _, own in times) == 10_000
        assert all(own >= 0 for _, own in times)
        assert sorted(e.start_ns for e, _ in times) == sorted(e.start_ns for e in events)


def test_equal_intervals_nest_in_the_order_of_their_numbers() -> None:
    outer = Event("cpu_op", "outer", 0, 10, 7, 1, {"External id": 1})
    inner = Event("cpu_op", "inner", 0, 10, 7, 1, {"External id": 2})
    for events in ([outer, inner], [inner, outer]):
        assert {e.name: own for e, own in own_times(events)} == {"outer": 0, "inner": 10}


def test_kernels_belong_to_the_step_that_launched_them(tmp_path: Path) -> None:
    launches = [
        event("cudaLaunchKernel", 50, 5, "cuda_runtime", correlation=1),  # before the step, run during it
        event("cudaLaunchKernel", 110, 5, "cuda_runtime", correlation=2),
        event("cuLaunchKernel", 120, 5, "cuda_driver", correlation=3),  # in the step, run after it
        event("cudaGraphLaunch", 130, 9, "cuda_runtime", correlation=4),
    ]
    kernels = [
        kernel("gemm", 140, 30, 1),
        kernel("gemm", 170, 20, 2),
        kernel("softmax", 250, 15, 3),
        kernel("gemm", 265, 40, 4),
        kernel("softmax", 305, 1.5, 4),
        kernel("gemm", 150, 1000, 99),
    ]
    steps = [
        event("denoising_step", 100, 100, "user_annotation"),
        event("denoising_step", 170, 135, "gpu_user_annotation"),  # Kineto's copy of the range on the device
    ]
    trace = load(write(tmp_path / "trace.json", [*launches, *kernels, *steps, event("aten::mm", 105, 20)]))
    found = report(trace)
    assert found.kernels == (KernelTime("gemm", 2, 60_000), KernelTime("softmax", 2, 16_500))
    assert found.kernels_without_launch == 1
    assert found.operators is None
    assert found.ranges == (RangeTime("denoising_step", 1, 100_000, 100_000),)
    assert "1 kernels have no launch" in found.to_text()
    alone = report(load(write(tmp_path / "trace.json", kernels)))
    assert alone.scope == "trace"
    assert alone.kernels == (KernelTime("gemm", 4, 1_090_000), KernelTime("softmax", 2, 16_500))


def test_times_are_exact_to_the_nanosecond(tmp_path: Path) -> None:
    # 2^53 ns are 104 days: as a float, microseconds since 1970 with three decimals lose the last ones.
    path = tmp_path / "trace.json"
    rows = ["1763690626123456.789", "1763690626123457", "0.001", "12.5", "1.5e3"]
    events = [f'{{"ph": "X", "cat": "cpu_op", "name": "a", "ts": {text}, "dur": {text}}}' for text in rows]
    path.write_text('{"traceEvents": [' + ", ".join(events) + "]}")
    wanted = [1763690626123456789, 1763690626123457000, 1, 12_500, 1_500_000]
    assert [(e.start_ns, e.duration_ns) for e in load(path).events] == [(ns, ns) for ns in wanted]


@pytest.fixture(scope="module")
def real_trace(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, float]]:
    """A trace of the embedded model at 64x64 with 2 steps, and torch.profiler's own sums of self time, in us."""
    pipe = checkpoints.load("tiny", torch.float32, torch.device("cpu"), progress=False)
    pipe.set_progress_bar_config(disable=True)
    size: dict[str, Any] = {"height": 64, "width": 64, "num_inference_steps": 2, "guidance_scale": 0.0}

    def call() -> None:
        pipe("a red circle", max_sequence_length=64, generator=torch.Generator().manual_seed(0), **size)

    call()
    activity = torch.profiler.ProfilerActivity.CPU
    with ranges.annotate(pipe), torch.profiler.profile(activities=[activity], record_shapes=True) as profile:
        call()
    path = tmp_path_factory.mktemp("trace") / "trace.json.gz"
    profile.export_chrome_trace(str(path))
    return path, {row.key: row.self_cpu_time_total for row in profile.key_averages()}


def test_a_real_trace_has_every_range(real_trace: tuple[Path, dict[str, float]]) -> None:
    path, _ = real_trace
    found = report(load(path))
    assert NAMES == ranges.STAGES
    assert [(r.name, r.count) for r in found.ranges] == list(zip(NAMES, (1, 2, 1, 1), strict=True))
    assert found.operators is not None
    assert len(found.operators) == 10
    steps = next(r for r in found.ranges if r.name == "denoising_step")
    assert 0 < sum(o.own_ns for o in found.operators) < steps.total_ns
    assert "aten::addmm" in [o.name for o in found.operators[:3]]


def test_own_times_are_those_of_the_profiler_itself(real_trace: tuple[Path, dict[str, float]]) -> None:
    path, expected = real_trace
    found = {o.name: o.own_ns / 1000 for o in operator_times(load(path))}
    assert len(found) > 30
    assert {name: expected[name] for name in found} == pytest.approx(found, abs=0.5, rel=1e-3)


def test_text_and_json_say_the_same(real_trace: tuple[Path, dict[str, float]]) -> None:
    path, _ = real_trace
    text, machine = command("report", path), command("report", path, "--json")
    assert (text.returncode, machine.returncode, text.stderr, machine.stderr) == (0, 0, "", "")
    found = json.loads(machine.stdout)
    assert found["schema"] == 1
    lines = text.stdout.splitlines()
    for row in found["ranges"]:
        figures = f"{row['count']:12}{row['total_ns'] / 1e6:12.3f}{row['median_ns'] / 1e6:12.3f}"
        assert f"{figures}  {row['name']}" in lines
    for row in found["operators"]:
        assert f"{row['count']:12}{row['own_ns'] / 1e6:12.3f}  {row['name']}" in lines


def test_plain_and_gzipped_traces_read_alike(tmp_path: Path) -> None:
    plain = write(tmp_path / "plain.json", BY_HAND)
    packed = tmp_path / "packed.json.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    misnamed = tmp_path / "plain.json.gz"
    misnamed.write_bytes(plain.read_bytes())
    assert load(plain).events == load(packed).events == load(misnamed).events


def test_names_cannot_drive_the_terminal(tmp_path: Path) -> None:
    names = ["\x1b[2Jevil\nline \ud800", "endless " * 10_000]
    trace = load(write(tmp_path / "trace.json", [event(name, 0, 1, thread=i) for i, name in enumerate(names)]))
    text = report(trace).to_text()
    assert "?[2Jevil?line ?" in text
    assert all(line.isprintable() and len(line) < 150 for line in text.splitlines())
    assert {row["name"] for row in json.loads(report(trace).to_json())["operators"]} == set(names)


WHOLE = json.dumps({"traceEvents": [event("aten::mm", 0, 1) for _ in range(100)]}).encode()
BAD: dict[str, tuple[bytes, str]] = {
    "not gzip": (b"\x00\x01 no trace", "not JSON, nor gzip"),
    "truncated gzip": (gzip.compress(WHOLE)[:100], "truncated"),
    "only gzip's first bytes": (b"\x1f\x8b", "truncated"),
    "damaged gzip": (gzip.compress(WHOLE)[:-8] + bytes(8), "damaged"),
    "damaged deflate stream": (gzip.compress(WHOLE)[:10] + b"\xff" * 50, "damaged"),
    "not JSON": (b"hello", "not JSON"),
    "truncated JSON": (WHOLE[:500], "truncated or damaged JSON"),
    "gzipped text": (gzip.compress(b"hello"), "not JSON"),
    "empty": (b"", "is empty"),
    "another JSON": (b'{"a": 1}', "no list `traceEvents`"),
    "a JSON list": (b"[1, 2]", "no list `traceEvents`"),
    "events that are no list": (b'{"traceEvents": {}}', "no list `traceEvents`"),
    "events that are no objects": (b'{"traceEvents": [1]}', "event 0 is not an object"),
    "no events": (b'{"traceEvents": []}', "no events"),
    "only metadata": (b'{"traceEvents": [{"ph": "M", "name": "process_name"}]}', "no events"),
    "no duration": (b'{"traceEvents": [{"ph": "X", "name": "a", "ts": 1}]}', "event 0 has no time `dur`"),
    "a word for a time": (
        b'{"traceEvents": [{"ph": "X", "name": "a", "ts": "soon", "dur": 1}]}',
        "event 0 has no time `ts`",
    ),
    "an endless time": (b'{"traceEvents": [{"ph": "X", "name": "a", "ts": 1e999, "dur": 1}]}', "out of range"),
    "a negative duration": (b'{"traceEvents": [{"ph": "X", "name": "a", "ts": 1, "dur": -1}]}', "out of range"),
    "not a number": (b'{"traceEvents": [{"ph": "X", "name": "a", "ts": NaN, "dur": 1}]}', "out of range"),
    "a number without end": (b'{"traceEvents": [' + b"9" * 10_000 + b"]}", "damaged JSON"),
    "no name": (b'{"traceEvents": [{"ph": "X", "ts": 1, "dur": 1}]}', "event 0 has no name"),
    "a list for a name": (b'{"traceEvents": [{"ph": "X", "name": [], "ts": 1, "dur": 1}]}', "event 0 has no name"),
    "a list for a thread": (b'{"traceEvents": [{"ph": "X", "name": "a", "tid": [], "ts": 1, "dur": 1}]}', "thread"),
    "deep nesting": (b'{"traceEvents": ' + b"[" * 1_000_000, "nested too deep"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_content_is_refused(tmp_path: Path, case: str) -> None:
    content, message = BAD[case]
    path = tmp_path / "trace.json.gz"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=message) as raised:
        load(path)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_bad_input_ends_in_one_line(tmp_path: Path) -> None:
    broken = tmp_path / "broken.json.gz"
    broken.write_bytes(zlib.compress(WHOLE))
    cases = {
        "no file": ["report", tmp_path / "missing.json.gz"],
        "is a folder": ["report", tmp_path],
        "not JSON": ["report", broken],
        "required": ["report"],
        "invalid choice": ["repot", broken],
        "unrecognized": ["report", broken, "--jsn"],
        "--help": [],
    }
    for message, arguments in cases.items():
        ended = command(*arguments)
        assert (ended.returncode, ended.stdout) == (2, "")
        assert ended.stderr.startswith("error: ")
        assert message in ended.stderr
        assert ended.stderr.count("\n") == 1


def test_a_file_that_may_not_be_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", refuse)  # the tests may run as root, who may read all
    with pytest.raises(UsageError, match="can't be read: Permission denied"):
        load(write(tmp_path / "trace.json", BY_HAND))
