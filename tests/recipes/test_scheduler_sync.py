"""The scheduler's device synchronisation: there once a call with the removal off, never with it on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile, record_function

import recipes
from recipes import Recipe
from utils import checkpoints
from utils.ranges import annotate


def ancestors(event: Any) -> set[str]:
    names = set()
    while event is not None:
        names.add(event.name)
        event = event.cpu_parent
    return names


def items_per_call(pipe: Any, call: Callable[[], object]) -> tuple[int, int]:
    """How often `aten::item` was called in one pipeline call: by the scheduler's step, and in the denoising loop."""
    step = pipe.scheduler.step

    def named_step(*args: Any, **kwargs: Any) -> Any:
        with record_function("scheduler_step"):
            return step(*args, **kwargs)

    pipe.scheduler.step = named_step
    with annotate(pipe), profile(activities=[ProfilerActivity.CPU]) as recorded:
        call()
    del pipe.scheduler.step
    items = [ancestors(event) for event in recorded.events() if event.name == "aten::item"]
    return sum("scheduler_step" in names for names in items), sum("denoising_step" in names for names in items)


def test_one_item_with_the_sync_and_none_without(tiny: Callable, draw: Callable) -> None:
    with_sync, without = tiny(), tiny()
    assert recipes.apply(with_sync, Recipe())["scheduler_sync_removal"] == "one sync at the first step"
    assert recipes.apply(without, Recipe(scheduler_sync_removal=True))["scheduler_sync_removal"] == "no sync"
    assert items_per_call(with_sync, lambda: draw(with_sync, steps=3)) == (1, 1)
    assert items_per_call(with_sync, lambda: draw(with_sync, steps=3)) == (1, 1), "at each call"
    assert items_per_call(without, lambda: draw(without, steps=3)) == (0, 0)
    assert np.array_equal(draw(with_sync, steps=3), draw(without, steps=3))


def test_scheduler_stays_itself(tiny: Callable) -> None:
    pipe = tiny()
    before = pipe.scheduler
    recipes.apply(pipe, Recipe())
    assert isinstance(pipe.scheduler, type(before))
    assert type(pipe.scheduler).__name__ == "FlowMatchEulerDiscreteScheduler"
    assert dict(pipe.scheduler.config) == dict(before.config)


@pytest.mark.parametrize("removal", [False, True])
def test_what_a_user_set_on_the_scheduler_stays(tiny: Callable, draw: Callable, removal: bool, tmp_path: Path) -> None:
    """Its configuration doesn't know of it."""
    plain, changed = tiny(), tiny()
    usual = draw(plain, steps=2)
    for pipe in (plain, changed):
        pipe.scheduler.set_shift(1.0)
    scheduler = changed.scheduler
    recipes.apply(changed, Recipe(scheduler_sync_removal=removal))
    assert changed.scheduler is scheduler
    assert np.array_equal(draw(changed, steps=2), draw(plain, steps=2))
    assert np.abs(draw(plain, steps=2) - usual).max() > 1e-3
    changed.save_pretrained(tmp_path)
    assert "recipes" not in (tmp_path / "model_index.json").read_text(), "diffusers' own class"


def copies_to_the_host_in_the_loop(trace: list[dict[str, Any]]) -> int:
    """Device-to-host copies launched inside the denoising steps of a Chrome trace."""
    steps = [e for e in trace if e.get("cat") == "user_annotation" and e["name"] == "denoising_step"]
    launched = {
        e["args"]["correlation"]
        for e in trace
        if e.get("cat") == "cuda_runtime"
        and any(s["tid"] == e["tid"] and s["ts"] <= e["ts"] < s["ts"] + s["dur"] for s in steps)
    }
    copies = [e for e in trace if e.get("cat") == "gpu_memcpy" and "DtoH" in e["name"]]
    return sum(e["args"]["correlation"] in launched for e in copies)


@pytest.mark.gpu
@pytest.mark.parametrize(("removal", "copies"), [(False, 2), (True, 0)])
def test_copies_to_the_host_in_the_loop(removal: bool, copies: int, tmp_path: Path) -> None:
    """On a GPU the search for the first timestep copies twice, and the host waits each time: how many indices
    `nonzero` found, and the index that `item` takes."""
    pipe = checkpoints.load("tiny", torch.bfloat16, torch.device("cuda"), progress=False)
    recipes.apply(pipe, Recipe(dtype="bfloat16", scheduler_sync_removal=removal))
    options = {"height": 64, "width": 64, "num_inference_steps": 3, "max_sequence_length": 64}

    def call() -> None:
        pipe("a red circle", guidance_scale=0.0, output_type="latent", **options)

    call()
    with annotate(pipe), profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        call()
        torch.cuda.synchronize()
    recorded.export_chrome_trace(str(tmp_path / "trace.json"))
    trace = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert copies_to_the_host_in_the_loop(trace) == copies
