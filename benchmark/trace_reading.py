"""Time the trace analysis on traces of three sizes: `python -m benchmark.trace_reading`.

The traces are made up, in Kineto's format and in the proportions of an eager 28-step run: operators nested three deep
with their shapes, a launch and a kernel each, and the arrows between them that viewers draw. Each is read and reported
in a fresh process, whose wall clock and peak memory count.
"""

from __future__ import annotations

import argparse
import gzip
import json
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

import torch

from utils import environment
from utils.errors import UserError, run_command
from utils.files import ROOT, write_text

SIZES = (375_000, 750_000, 1_500_000)  # events
STEPS = 28
OUTPUT = ROOT / "results" / "trace-analysis" / "scaling.json"
_EVENTS_AN_OPERATOR = 7  # linear, addmm, a view, the launch, the kernel and two ends of an arrow
_KERNELS = (
    ("nvjet_tst_128x256_64x4_1x2_h_bz_coopA_TNT", 130_000),
    ("void flash_fwd_kernel<Flash_fwd_kernel_traits<128, 128, 64, 4, false, false, cutlass::bfloat16_t>>", 90_000),
    ("void at::native::vectorized_elementwise_kernel<4, at::native::GeluCUDAKernelImpl(at::TensorIterator)>", 25_000),
    ("void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<c10::BFloat16, float>", 20_000),
)
_MEASURED = """
import json, resource, sys, time
from pathlib import Path
begun = time.perf_counter()
from trace_analysis.load import load
from trace_analysis.report import Analysis
trace = load(Path(sys.argv[1]))
loaded = time.perf_counter()
text = Analysis(trace).report.to_json()
ended = time.perf_counter()
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
steps = len(json.loads(text)["steps"])
print(json.dumps({"load_s": loaded - begun, "report_s": ended - loaded, "peak_bytes": peak, "steps": steps}))
"""


def write_trace(path: Path, events: int) -> int:
    """A trace of about so many events (arrows among them) to `path`, gzipped; returns its bytes unpacked."""
    with gzip.open(path, "wt", compresslevel=1) as file:
        return _write(file, max(1, events // (STEPS * _EVENTS_AN_OPERATOR)))


def _write(file: TextIO, operators: int) -> int:
    size = file.write(
        '{\n  "schemaVersion": 1,\n  "deviceProperties": [\n    {"id": 0, "name": "NVIDIA H100 80GB HBM3"}\n  ],\n'
        '  "baseTimeNanoseconds": 1790857026000000000,\n  "traceEvents": ['
    )
    separator, number, host, device = "", 0, 4_378_859_421_046_000, 0

    def event(row: dict[str, Any], start: int, duration: int | None) -> None:
        nonlocal separator, size
        times = f'"ts": {start // 1000}.{start % 1000:03d}'
        if duration is not None:
            times += f', "dur": {duration // 1000}.{duration % 1000:03d}'
        size += file.write(f"{separator}\n  {json.dumps(row)[:-1]}, {times}}}")
        separator = ","

    place = {"pid": 7, "tid": 7}
    shapes = {
        "Input Dims": [[3072], [4608, 3072], [3072, 3072], [], []],
        "Input type": ["c10::BFloat16"] * 3 + ["Scalar"] * 2,
        "Input Strides": [[1], [3072, 1], [1, 3072], [], []],
        "Concrete Inputs": ["", "", "", "1", "1"],
    }
    for _ in range(STEPS):
        begun = host
        for _ in range(operators):
            number += 1
            name, duration = _KERNELS[number % len(_KERNELS)]
            ids = {"External id": number, "Record function id": 0, "Ev Idx": number}
            event({"ph": "X", "cat": "cpu_op", "name": "aten::linear", **place, "args": ids}, host, 30_000)
            event({"ph": "X", "cat": "cpu_op", "name": "aten::t", **place, "args": ids}, host + 1_000, 2_000)
            inner = {"ph": "X", "cat": "cpu_op", "name": "aten::addmm", **place, "args": {**ids, **shapes}}
            event(inner, host + 4_000, 24_000)
            link = {"External id": number, "cbid": 211, "correlation": number}
            call = {"ph": "X", "cat": "cuda_runtime", "name": "cudaLaunchKernel", **place, "args": link}
            event(call, host + 20_000, 5_000)
            arrow = {"ph": "s", "id": number, **place, "cat": "ac2g", "name": "ac2g"}
            event(arrow, host + 20_000, None)
            device = max(device + 1_100, host + 27_000)
            run = {"ph": "X", "cat": "kernel", "name": name, "pid": 0, "tid": 7}
            event({**run, "args": {**link, "device": 0, "stream": 7, "grid": [24, 18, 1]}}, device, duration)
            event({**arrow, "ph": "f", "pid": 0, "bp": "e"}, device, None)
            device += duration
            host += 33_017
        event({"ph": "X", "cat": "user_annotation", "name": "denoising_step", **place, "args": {}}, begun, host - begun)
    return size + file.write("\n  ]\n}\n")


def measure(events: int) -> dict[str, Any]:
    """One size: seconds and peak memory of a fresh process that reads and reports it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json.gz"
        unpacked = write_trace(path, events)
        begun = time.perf_counter()
        command = [sys.executable, "-c", _MEASURED, str(path)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        wall = time.perf_counter() - begun
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"it ended with code {done.returncode} and said nothing"]
        raise UserError(f"the analysis of {events} events failed: {said[-1]}")
    return {"events": events, "unpacked_bytes": unpacked, "wall_s": round(wall, 3), **json.loads(done.stdout)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="events of each trace")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="JSON file to write")
    arguments = parser.parse_args()

    def run() -> None:
        started_at = datetime.now(UTC).isoformat(timespec="seconds")
        machine = environment.capture(torch.device("cpu"))
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        rows = []
        for events in arguments.sizes:
            rows.append(measure(events))
            print(json.dumps(rows[-1]), flush=True)
        found = {
            "schema": 1,
            "rows": rows,
            "environment": machine,
            "command": "python -m benchmark.trace_reading",
            "started_at": started_at,
        }
        write_text(arguments.output, json.dumps(found, indent=1) + "\n")

    run_command(run, debug=False)


if __name__ == "__main__":
    main()
