"""Traces written by hand in Kineto's format (pytorch/kineto, libkineto/src/output_json.cpp), and the command."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trace_analysis.load import load
from trace_analysis.report import Analysis
from utils.files import ROOT

H100 = {"id": 0, "name": "NVIDIA H100 80GB HBM3", "totalGlobalMem": 84929347584, "computeMajor": 9, "numSms": 132}


class Writer:
    """A trace in the making; times in microseconds, as in the file. Process 7; thread 1, device 0, stream 7."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.events: list[dict[str, Any]] = []
        self.properties: dict[str, Any] = {"schemaVersion": 1, "deviceProperties": [H100]}
        self.correlation = 0

    def host(
        self, name: str, start: float, duration: float, category: str = "cpu_op", thread: int = 1, **more: Any
    ) -> None:
        place = {"pid": 7, "tid": thread, "ts": start, "dur": duration}
        self.events.append({"ph": "X", "cat": category, "name": name, **place, "args": more})

    def step(self, start: float, duration: float, name: str = "denoising_step") -> None:
        self.host(name, start, duration, "user_annotation")

    def frame(self, name: str, start: float, duration: float) -> None:
        self.host(name, start, duration, "python_function")

    def call(self, name: str, start: float, duration: float, thread: int = 1) -> int:
        """A CUDA runtime call; returns its correlation id."""
        self.correlation += 1
        self.host(name, start, duration, "cuda_runtime", thread, correlation=self.correlation, cbid=1)
        return self.correlation

    def run(
        self,
        name: str,
        start: float,
        duration: float,
        correlation: int,
        stream: int = 7,
        category: str = "kernel",
        **more: Any,
    ) -> None:
        """What a call launched, on the GPU."""
        arguments = {"device": 0, "stream": stream, "correlation": correlation, **more}
        place = {"pid": 0, "tid": stream, "ts": start, "dur": duration}
        self.events.append({"ph": "X", "cat": category, "name": name, **place, "args": arguments})

    def kernel(self, name: str, launched: float, start: float, duration: float, stream: int = 7) -> None:
        """A kernel and its launch, a call of 4 us."""
        self.run(name, start, duration, self.call("cudaLaunchKernel", launched, 4), stream)

    def addmm(
        self, start: float, duration: float, rows: int, columns: int, inner: int, dtype: str = "c10::BFloat16"
    ) -> None:
        """The operator on [columns], [rows, inner] and [inner, columns], with its shapes."""
        inputs = {
            "Input Dims": [[columns], [rows, inner], [inner, columns], [], []],
            "Input type": [dtype, dtype, dtype, "Scalar", "Scalar"],
            "Concrete Inputs": ["", "", "", "1", "1"],
        }
        self.host("aten::addmm", start, duration, **inputs)

    def item(self, start: float, duration: float) -> None:
        """tensor.item(): the copy and the wait inside aten::_local_scalar_dense; the copy's last us is 4 before the
        end, the wait from the 6th us to 2 before the end."""
        self.host("aten::item", start, duration)
        self.host("aten::_local_scalar_dense", start + 1, duration - 2)
        copy = self.call("cudaMemcpyAsync", start + 2, 3)
        self.run("Memcpy DtoH (Device -> Pinned)", start + duration - 5, 1, copy, category="gpu_memcpy", bytes=4)
        self.call("cudaStreamSynchronize", start + 6, duration - 8)

    def random(self, seed: int) -> None:
        """Steps back to back; kernels on three streams, launched at random, that overlap and lag behind; and copies
        without a launch, called "lost"."""
        rng = random.Random(seed)
        at = 0.0
        for _ in range(rng.randint(1, 5)):
            length = rng.randint(50, 200)
            self.step(at, length)
            at += length
        for _ in range(rng.randint(5, 60)):
            launched = round(rng.uniform(-20, at + 20), 3)
            begin = round(launched + rng.choice([0, 0.5, rng.uniform(0, 150)]), 3)
            name = rng.choice(["gemm_bf16", "flash_fwd", "elementwise", "weird"])
            self.kernel(name, launched, begin, round(rng.uniform(0, 40), 3), stream=rng.choice([7, 8, 9]))
        for _ in range(5):
            self.run("lost", round(rng.uniform(0, at), 3), 5.0, 10**6, category="gpu_memcpy")

    def write(self, name: str = "trace.json", events: list[dict] | None = None) -> Path:
        path = self.folder / name
        path.write_text(json.dumps({**self.properties, "traceEvents": self.events if events is None else events}))
        return path

    def analyse(self, **options: Any) -> Analysis:
        return Analysis(load(self.write()), **options)


@pytest.fixture
def writer(tmp_path: Path) -> Writer:
    return Writer(tmp_path)


@pytest.fixture
def writers(tmp_path: Path) -> Callable[[str], Writer]:
    """writers(name): a trace in a folder of that name, for tests of several."""

    def make(name: str) -> Writer:
        (tmp_path / name).mkdir()
        return Writer(tmp_path / name)

    return make


@pytest.fixture(scope="session")
def command() -> Callable[..., subprocess.CompletedProcess[str]]:
    """command(*arguments): `python -m trace_analysis` with them."""

    def call(*arguments: object) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, "-m", "trace_analysis", *map(str, arguments)]
        return subprocess.run(line, cwd=ROOT, capture_output=True, text=True)

    return call


@pytest.fixture
def two_steps(writer: Writer) -> Writer:
    """Two steps on a GPU, whose figures are worked out in test_steps.py.

    Host    encoding 0..50 | step 0: 100..200 | step 1: 200..300 | decoding 310..330
    GPU     embed 40..60   | gemm 130..160, attention 160..180, norm 175..195 on stream 8 | gemm 205..260, copy 270..275
                           | conv 330..350
    """
    w = writer
    w.step(0, 50, "prompt_encoding")
    w.kernel("void at::native::elementwise_kernel<embed>", 20, 40, 20)
    w.step(100, 100)
    w.addmm(105, 20, 64, 128, 256)
    w.kernel("nvjet_tst_128x256_64x4_1x2_h_bz_coopA_TNT", 120, 130, 30)
    w.kernel("flash_fwd_kernel", 130, 160, 20)
    w.kernel("vectorized_layer_norm_kernel", 140, 175, 20, stream=8)
    w.step(200, 100)
    w.kernel("nvjet_tst_128x256_64x4_1x2_h_bz_coopA_TNT", 196, 205, 55)  # launched in step 0, run in step 1's window
    w.run("Memcpy DtoD (Device -> Device)", 270, 5, w.call("cudaMemcpyAsync", 264, 3), category="gpu_memcpy", bytes=64)
    w.step(310, 20, "decoding")
    w.kernel("cudnn_convolution_fprop", 320, 330, 20)
    return w
