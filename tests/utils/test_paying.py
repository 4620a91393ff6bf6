"""Rungs that don't pay, from result files: those of this repository, and made up ones of several machines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

import recipes
from utils import environment, results
from utils.paying import is_small, not_paying

CPU = {"device_type": "cpu", "device": "A Processor", "cores": 2, "torch": "2.13.0+cpu", "power_limit_w": None}
GPU = {"device_type": "cuda", "device": "NVIDIA H100 80GB HBM3", "cores": 16, "torch": "2.11.0", "power_limit_w": 700.0}
REQUEST = {"height": 64, "width": 64, "batch": 1, "steps": 4}
_ALSO = ("applied", "stages_ms", "denoise_step_ms", "compile_s", "start_s", "warmup_calls")
_MORE = ("peak_memory_bytes", "image_difference", "started_at", "command")


def write(
    root: Path, where: dict[str, Any], checkpoint: str, request: dict[str, Any] = REQUEST, **medians: float
) -> None:
    """Result files of rungs, each on top of the one before; their speed-ups are known to 2 %."""
    parent, baseline = None, next(iter(medians.values()))
    for name, seconds in medians.items():
        ratio = {"value": baseline / seconds, "low": 0.98 * baseline / seconds, "high": 1.02 * baseline / seconds}
        about = {"recipe": {"name": name, "parent": parent}, "checkpoint": checkpoint, "request": request}
        about |= {"environment": where, "latency_s": {"median": seconds}, "ratio_to_baseline": ratio}
        about |= dict.fromkeys((*_ALSO, *_MORE))
        results.write(results.folder(root, where, checkpoint) / results.file_name(name, request), about)
        parent = name


def test_the_default_recipe_leaves_out_what_does_not_pay() -> None:
    cpu = torch.device("cpu")
    assert recipes.fastest(cpu).fused_qkv
    fastest = recipes.fastest(cpu, {"fused_qkv"})
    assert not fastest.fused_qkv
    assert fastest.hoisted_embeddings


def test_committed_results_are_read() -> None:
    here = environment.capture(torch.device("cpu"))
    assert not_paying(results.RESULTS, {**here, "cores": 2, "torch": "2.13.0+cpu"}, "tiny") <= set(recipes.named())


def test_nothing_measured(tmp_path: Path) -> None:
    assert not_paying(tmp_path, CPU, "tiny") == frozenset()
    write(tmp_path, GPU, "tiny", fp32=1.0, bf16=2.0)
    assert not_paying(tmp_path, CPU, "tiny") == frozenset()
    write(tmp_path, CPU, "random/flux-dev", fp32=1.0, bf16=2.0)
    assert not_paying(tmp_path, CPU, "tiny") == frozenset()


def test_nearest_results_count(tmp_path: Path) -> None:
    write(tmp_path, GPU, "random/flux-dev", bf16=2.0, compiled=1.0, max_autotune=1.5, fused_qkv=0.9)
    assert not_paying(tmp_path, GPU, "black-forest-labs/FLUX.1-schnell") == {"max_autotune"}
    other = {**GPU, "device": "NVIDIA H200", "power_limit_w": None}
    assert not_paying(tmp_path, other, "random/flux-dev") == {"max_autotune"}
    write(tmp_path, GPU, "random/flux-schnell", bf16=2.0, compiled=1.0, fused_qkv=1.2)
    assert not_paying(tmp_path, other, "random/flux-schnell") == {"fused_qkv"}, "the same checkpoint elsewhere"
    write(tmp_path, other, "random/flux-dev", bf16=2.0, compiled=2.5)
    assert not_paying(tmp_path, other, "random/flux-schnell") == {"compiled"}, "the machine before the checkpoint"
    assert not_paying(tmp_path, GPU, "random/flux-dev") == {"max_autotune"}


def test_noise_is_no_reason(tmp_path: Path) -> None:
    write(tmp_path, GPU, "random/flux-dev", bf16=2.0, compiled=1.0, fused_qkv=1.13)
    assert not_paying(tmp_path, GPU, "random/flux-dev") == frozenset()


def test_a_rung_that_pays_at_some_size_pays(tmp_path: Path) -> None:
    write(tmp_path, GPU, "random/flux-dev", bf16=2.0, compiled=2.5, fused_qkv=3.0)
    write(tmp_path, GPU, "random/flux-dev", {**REQUEST, "batch": 4}, bf16=8.0, compiled=7.0, fused_qkv=8.5)
    assert not_paying(tmp_path, GPU, "random/flux-dev") == {"fused_qkv"}


def test_size_of_a_checkpoint(tiny_copy: Path) -> None:
    assert is_small("tiny")
    assert is_small(str(tiny_copy))
    assert not is_small("random/flux-dev")
    assert not is_small("/a/folder/of/another/machine")
