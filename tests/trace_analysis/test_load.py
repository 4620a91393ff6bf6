"""Reading trace files: exact times, any order, and every kind of bad file."""

from __future__ import annotations

import gzip
import json
import random
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from benchmark import trace_reading
from trace_analysis import markdown, stream, tables
from trace_analysis.load import Trace, load
from trace_analysis.page import page
from trace_analysis.report import Analysis
from utils.errors import UsageError, UserError


def write(path: Path, events: str) -> Path:
    path.write_text(f'{{"traceEvents": [{events}]}}')
    return path


def rows(trace: Trace) -> list[tuple]:
    lanes = [trace.lanes[lane] for lane in trace.lane]
    names = [trace.name_of(i) for i in range(len(trace))]
    return list(zip(names, trace.start.tolist(), trace.end.tolist(), lanes, strict=True))


def test_times_are_exact_to_the_nanosecond(tmp_path: Path) -> None:
    # 2^53 ns are 104 days: as a float, microseconds since 1970 with three decimals lose the last ones.
    texts = ["1763690626123456.789", "1763690626123457", "0.001", "12.5", "1.5e3", "7.12399"]
    events = [f'{{"ph": "X", "cat": "cpu_op", "name": "a", "ts": {text}, "dur": {text}}}' for text in texts]
    found = load(write(tmp_path / "trace.json", ", ".join(events)))
    wanted = sorted([1763690626123456789, 1763690626123457000, 1, 12_500, 1_500_000, 7_123])
    assert found.start.tolist() == wanted
    assert (found.end - found.start).tolist() == wanted


def test_plain_and_gzipped_traces_read_alike(two_steps, tmp_path: Path) -> None:
    plain = two_steps.write("plain.json")
    packed, halves, misnamed = (tmp_path / name for name in ("packed.json.gz", "halves.gz", "plain.json.gz"))
    data = plain.read_bytes()
    packed.write_bytes(gzip.compress(data))
    halves.write_bytes(gzip.compress(data[:1000]) + gzip.compress(data[1000:]))  # two members
    misnamed.write_bytes(data)
    wanted = rows(load(plain))
    assert all(rows(load(path)) == wanted for path in (packed, halves, misnamed))


@pytest.mark.parametrize("size", [1, 7, 64, 100_000])
def test_the_size_of_what_is_read_at_a_time_changes_nothing(
    two_steps, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    two_steps.host("naïve ✓ 𝄞", 3, 1)  # letters of two, three and four bytes
    path = two_steps.write()
    wanted = rows(load(path))
    monkeypatch.setattr(stream, "_CHUNK", size)
    found = load(path)
    assert rows(found) == wanted
    assert found.properties["deviceProperties"][0]["name"] == "NVIDIA H100 80GB HBM3"
    assert found.incomplete is None


def test_keys_after_the_events_are_read(two_steps) -> None:
    path = two_steps.folder / "late.json"
    path.write_text(json.dumps({"traceEvents": two_steps.events, **two_steps.properties}, indent=2))
    assert Analysis(load(path)).report.rates.gpu == "NVIDIA H100 80GB HBM3"


def test_order_of_events_does_not_matter(two_steps) -> None:
    wanted = two_steps.analyse().report
    for seed in range(5):
        shuffled = random.Random(seed).sample(two_steps.events, len(two_steps.events))
        path = two_steps.write(events=shuffled)
        assert Analysis(load(path)).report == wanted


def test_a_truncated_file_is_read_as_far_as_it_is_whole(two_steps, tmp_path: Path) -> None:
    whole = two_steps.write().read_bytes()
    events = len(load(two_steps.write()))
    cut = tmp_path / "cut.json.gz"
    counts = []
    for end in range(len(whole) - 40, 400, -97):
        cut.write_bytes(gzip.compress(whole[:end]))
        found = load(cut)
        assert found.incomplete is not None
        assert f"after {len(found)} events" in found.incomplete
        counts.append(len(found))
    assert counts == sorted(counts, reverse=True)
    assert events - 2 <= counts[0] <= events
    assert counts[-1] < 5
    report = Analysis(load(cut)).report
    assert report.findings[0].name == "incomplete"
    assert report.gaps is report.kinds is report.rates is report.syncs is None
    assert all(step.device is None for step in report.steps)


def test_a_truncated_gzip_stream_is_read_as_far_as_it_is_whole(two_steps, tmp_path: Path) -> None:
    rng = random.Random(0)
    for i in range(2000):
        two_steps.host(f"aten::{rng.random()}", 400 + i, 1)
    data = gzip.compress(two_steps.write().read_bytes())
    cut = tmp_path / "cut.json.gz"
    cut.write_bytes(data[: len(data) // 2])
    found = load(cut)
    assert 500 < len(found) < 1500
    assert "its gzip stream ends too early" in str(found.incomplete)
    damaged = bytearray(data)
    damaged[len(data) // 2 :] = b"\xff" * (len(data) - len(data) // 2)
    cut.write_bytes(damaged)
    assert 500 < len(load(cut)) < 1500


def test_events_that_cannot_be_read_are_counted(writer) -> None:
    writer.step(0, 10)
    for wrong in (
        {"ts": "soon"},
        {"ts": None},
        {"dur": -1.0},
        {"dur": True},
        {"name": 3},
        {"name": None},
        {"tid": [1]},
        {"args": 3},
        {"cat": []},
    ):
        writer.events.append({"ph": "X", "cat": "cpu_op", "name": "a", "ts": 1, "dur": 1, "pid": 7, "tid": 1, **wrong})
    path = writer.folder / "trace.json"
    text = json.dumps({"traceEvents": writer.events})
    path.write_text(text.replace('"ts": 1, "dur": 1', '"ts": 1e999, "dur": 1', 1))
    found = load(path)
    assert (len(found), found.skipped) == (1, 9)
    assert found.shapes == {}
    (finding, *_) = Analysis(found).report.findings
    assert finding.name == "unreadable_events"
    assert finding.message.startswith("9 events")


@pytest.mark.parametrize("text", ["99999999999999999", "-99999999999999999", "4000000000000000", "1e300", "1" * 30])
@pytest.mark.parametrize("point", ["", ".5"])
def test_times_out_of_range_are_skipped_whole(tmp_path: Path, text: str, point: str) -> None:
    """With a point and without; nothing of the event stays behind in any column."""
    number = text if "e" in text else text + point
    events = ", ".join(
        f'{{"ph": "X", "cat": "cpu_op", "name": "{name}", "ts": {ts}, "dur": 1, "args": {{"correlation": {tied}}}}}'
        for name, ts, tied in (("bad", number, 1), ("good", "7", 2))
    )
    found = load(write(tmp_path / "trace.json", events))
    assert (found.skipped, len(found), found.names) == (1, 1, ("good",))
    assert {len(column) for column in (found.name, found.lane, found.category, found.correlation, found.end)} == {1}
    assert (found.start.tolist(), found.correlation.tolist()) == ([7000], [2])


@pytest.mark.parametrize(
    "shapes",
    [
        {"Input Dims": 3},
        {"Input Dims": [[2, -1]]},
        {"Input Dims": [3, "x"]},
        {"Input Dims": [[2, 2]], "Input type": None},
        {"Input Dims": [[2, 2]], "Concrete Inputs": 5},
    ],
)
def test_malformed_shapes_cost_only_the_shapes(writer, shapes: dict) -> None:
    writer.host("aten::mm", 0, 5, **shapes)
    writer.addmm(10, 5, 2, 3, 4)
    found = load(writer.write())
    assert (len(found), found.skipped) == (2, 0)
    assert [found.name_of(event) for event in found.shapes] == ["aten::addmm"]


def test_shapes_of_a_skipped_event_are_nobodys(writer) -> None:
    writer.addmm(10, 5, 2, 3, 4)
    writer.events[0]["tid"] = [1]
    writer.host("aten::mm", 0, 5)
    found = load(writer.write())
    assert (found.skipped, found.shapes) == (1, {})


@pytest.mark.parametrize("members", [2, 5, 40])
def test_many_members_in_one_chunk(two_steps, members: int) -> None:
    plain = two_steps.write("plain.json")
    data = plain.read_bytes()
    size = -(-len(data) // members)
    packed = two_steps.folder / "members.json.gz"
    packed.write_bytes(b"".join(gzip.compress(data[at : at + size]) for at in range(0, len(data), size)))
    found = load(packed)
    assert rows(found) == rows(load(plain))
    assert found.incomplete is None


@pytest.mark.parametrize("wrong", ['{"ph": "X" "cat"}', '{"ph": X}', '{"ph": "X",}', '{"a": "\\u12xx"}', "9" * 5000])
def test_a_bad_event_in_the_middle_is_no_early_end(tmp_path: Path, wrong: str) -> None:
    good = '{"ph": "X", "cat": "cpu_op", "name": "a", "ts": 1, "dur": 1}'
    found = load(write(tmp_path / "trace.json", ", ".join([good] * 3 + [wrong] + [good] * 30)))
    assert len(found) == 3
    assert str(found.incomplete).startswith("after 3 events: what follows is no JSON (")


def test_a_path_may_be_text(two_steps) -> None:
    path = two_steps.write()
    assert load(str(path)).path == path


WHOLE = json.dumps({"traceEvents": [{"ph": "X", "cat": "cpu_op", "name": "a", "ts": 0, "dur": 1}] * 100}).encode()
BAD: dict[str, tuple[bytes, str]] = {
    "not gzip": (b"\x00\x01 no trace", "is not JSON, nor gzip"),
    "gzip cut before the first event": (gzip.compress(WHOLE)[:15], "truncated or damaged"),
    "only gzip's first bytes": (b"\x1f\x8b", "truncated or damaged"),
    "damaged deflate stream": (gzip.compress(WHOLE)[:10] + b"\xff" * 50, "truncated or damaged"),
    "not JSON": (b"hello", "is not JSON"),
    "cut before the first event": (WHOLE[:20], "truncated or damaged"),
    "gzipped text": (gzip.compress(b"hello"), "is not JSON"),
    "empty": (b"", "is empty"),
    "gzipped nothing": (gzip.compress(b""), "is empty"),
    "white space": (b" \n ", "is empty"),
    "another JSON": (b'{"a": 1}', "no list `traceEvents`"),
    "a JSON list": (b"[1, 2]", "no list `traceEvents`"),
    "events that are no list": (b'{"traceEvents": {}}', "no list `traceEvents`"),
    "events that are no objects": (b'{"traceEvents": [1]}', "event 0 is not an object"),
    "no events": (b'{"traceEvents": []}', "no events"),
    "only metadata": (b'{"traceEvents": [{"ph": "M", "name": "process_name"}]}', "no events"),
    "begin and end instead of durations": (b'{"traceEvents": [{"ph": "B", "name": "a", "ts": 1}]}', "no events"),
    "no event that can be read": (b'{"traceEvents": [{"ph": "X", "name": "a", "ts": 1}]}', "1 can't be read"),
    "a number without end": (b'{"traceEvents": [' + b"9" * 10_000 + b"]}", "damaged"),
    "deep nesting": (b'{"traceEvents": ' + b"[" * 1_000_000, "nested too deep"),
    "deep nesting elsewhere": (b'{"a": ' + b"[" * 1_000_000, "nested too deep"),
    "no colon": (b'{"traceEvents" [1]}', "truncated or damaged"),
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


def test_damage_anywhere_ends_in_a_report_or_in_one_line(two_steps) -> None:
    """Bytes changed, taken out and put in at random: a whole report, or a UsageError, never anything else."""
    whole = two_steps.write().read_bytes()
    path = two_steps.folder / "damaged.json"
    rng = random.Random(0)
    refused = []
    for _ in range(400):
        data = bytearray(whole)
        for _ in range(rng.choice([1, 3, 30])):
            at = rng.randrange(len(data))
            data[at : at + rng.choice([0, 1, 1, 20])] = rng.choice([b"", b'"', b"9", b"-", b"[", b"}", b"e5", b"\xff"])
        path.write_bytes(data)
        try:
            analysis = Analysis(load(path))
            markdown.document("x", tables.report_tables(analysis.report))
            page(analysis)
            json.loads(analysis.report.to_json())
        except UsageError as error:
            refused.append(str(error))
    assert 0 < len(refused) < 200
    assert not any("\n" in message for message in refused)


def test_an_event_without_end_does_not_fill_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "_LONGEST", 1 << 16)
    path = tmp_path / "endless.json"
    path.write_bytes(
        b'{"traceEvents": [{"ph": "X", "cat": "c", "ts": 0, "dur": 1, "name": "a"}, {"name": "' + b"x" * (1 << 24)
    )
    found = load(path)
    assert len(found) == 1
    assert found.incomplete is not None


def test_huge_strings_are_read(writer) -> None:
    writer.host("endless " * 100_000, 0, 1)
    assert len(load(writer.write()).names[0]) == 800_000


def test_bad_input_ends_in_one_line(tmp_path: Path, command: Callable) -> None:
    broken = tmp_path / "broken.json.gz"
    broken.write_bytes(zlib.compress(WHOLE))
    good = tmp_path / "good.json"
    good.write_bytes(WHOLE)
    cases = {
        "no file": ["report", tmp_path / "missing.json.gz"],
        "is a folder": ["report", tmp_path],
        "not JSON": ["report", broken],
        "required": ["report"],
        "invalid choice": ["repot", broken],
        "unrecognized": ["report", broken, "--jsn"],
        "--help": [],
        "the following arguments are required: after": ["diff", good],
        "has no GPU in it": ["diff", good, good],
        "does not exist": ["report", good, "--html", tmp_path / "nowhere" / "page.html"],
    }
    for message, arguments in cases.items():
        ended = command(*arguments)
        assert (ended.returncode, ended.stdout) == (2, ""), ended
        assert ended.stderr.startswith("error: ")
        assert message in ended.stderr
        assert ended.stderr.count("\n") == 1


def test_a_file_that_may_not_be_read_is_refused(two_steps, monkeypatch: pytest.MonkeyPatch) -> None:
    path = two_steps.write()

    def refuse(path: Path, *_: object) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", refuse)  # the tests may run as root, who may read all
    with pytest.raises(UsageError, match="can't be read: Permission denied"):
        load(path)


def test_columns_agree(two_steps) -> None:
    trace = load(two_steps.write())
    columns = (trace.name, trace.category, trace.start, trace.end, trace.lane, trace.correlation)
    assert {len(column) for column in columns} == {len(two_steps.events)}
    assert np.all(np.diff(trace.start) >= 0)
    assert len(trace.of({"kernel"})) == 6
    assert trace.has_gpu


def test_a_bar_shows_what_takes_long(
    two_steps, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    load(two_steps.write())
    assert capfd.readouterr().err == ""
    monkeypatch.setattr(stream, "_SLOW_S", 0)
    load(two_steps.write())
    assert "reading trace.json" in capfd.readouterr().err


def test_a_timed_reading_that_dies_without_a_word_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace_reading, "_MEASURED", "import os; os._exit(3)")
    with pytest.raises(UserError, match="200 events failed: it ended with code 3 and said nothing"):
        trace_reading.measure(200)
