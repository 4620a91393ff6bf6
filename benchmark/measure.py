"""Measure one job in this process: `python -m benchmark.measure JOB`, which run_benchmark.py starts afresh each time.

Timed calls come first and alone; peak memory, stages and denoising steps are measured in calls of their own, whose
emptied caches and synchronisations would slow the others; the profiler comes last.
"""

from __future__ import annotations

import gzip
import shutil
import sys
import tempfile
import time
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

from utils.quiet import quiet

with quiet():
    import recipes
    from benchmark import prompts
    from benchmark.job import Job
    from benchmark.memory import peak_bytes, reset_peak
    from export.store import PackageStore, default_folder
    from recipes.dtype import torch_dtype
    from utils import checkpoints, command_line, environment, ranges, results
    from utils.compile_clock import CompileClock
    from utils.errors import run_command
    from utils.files import replacing
    from utils.image_metrics import difference
    from utils.request import Request
    from utils.timing import StageTimer, summary, synchronize, timed, warm_up

_INSTRUMENTED_CALLS = 3
_BY_LOOP = "with its loop, by the number of steps"
_STAGE_NAMES = {"prompt_encoding": "text_encode", "decoding": "vae_decode", "postprocessing": "postprocess"}


def measure(job: Job) -> dict[str, Any]:
    """All figures of a result file but the ratio; writes the request's image, and the trace if one is asked for."""
    device = torch.device(job.device)
    started_at = datetime.now(UTC).isoformat(timespec="seconds")
    machine = environment.capture(device, job.commit)
    reset_peak(device)
    pipe = checkpoints.load(job.checkpoint, torch_dtype(job.recipe), device, progress=False)
    pipe.set_progress_bar_config(disable=True)
    load_peak = peak_bytes(device)

    def call(request: Request) -> list[Image.Image]:
        return request.run(pipe)

    def fresh(number: int) -> Request:
        prompt = prompts.prompt(job.checkpoint, number)
        return replace(job.request, prompt=prompt, seed=job.request.seed + 1000 + number * job.request.batch)

    loaded = time.perf_counter()
    folder = job.cache_dir or default_folder()
    packages = PackageStore(folder, job.build_packages, to_build=command_line.WITHOUT_CACHED_MODEL)
    applied = recipes.apply(pipe, job.recipe, packages)
    synchronize(device)
    apply_s = time.perf_counter() - loaded
    start_s = 0.0

    with CompileClock(progress=True) as clock, tqdm(desc=f"{job.name}: warm-up", unit=" calls", delay=60) as bar:

        def warming(number: int) -> None:
            nonlocal start_s
            call(fresh(prompts.WARM_UP + number))
            synchronize(device)
            start_s = start_s or time.perf_counter() - loaded
            bar.update()

        warm = warm_up(warming, device)
    before = environment.device_state(device)
    bar = tqdm(range(job.runs), desc=job.name, unit=" runs")
    latencies = [timed(partial(call, fresh(number)), device) for number in bar]
    after = environment.device_state(device)
    reset_peak(device)
    call(fresh(job.runs))
    run_peak = peak_bytes(device)

    timer = StageTimer(device)
    with ranges.watch(pipe, timer.range):
        for number in range(_INSTRUMENTED_CALLS):
            call(fresh(job.runs + 1 + number))
    (image, *_) = call(job.request)
    image.save(job.image)
    if job.trace is not None:
        with ranges.annotate(pipe):
            trace(lambda: call(fresh(0)), job.trace, job.trace_stacks, device)

    # Of a cache's steps, of which few may take long, a median would say nothing.
    by_loop = ranges.DENOISING_LOOP in timer.seconds or job.recipe.cache is not None
    loops, steps = denoising_ms(timer.seconds, job.request.steps, by_loop)
    stages = {name: round(1000 * median(timer.seconds[stage]), 3) for stage, name in _STAGE_NAMES.items()}
    stages["denoise"] = round(median(loops), 3)
    return {
        "recipe": {"name": job.name, "hash": job.recipe.hash, "parent": job.parent, **job.recipe.to_dict()},
        "applied": applied,
        "lossless": recipes.is_lossless(job.recipe),
        "checkpoint": job.checkpoint,
        "request": job.request.to_dict(),
        "latency_s": {"runs": latencies, **summary(latencies)},
        "stages_ms": stages,
        "denoise_step_ms": summary(steps),
        "denoise_step_timed": _BY_LOOP if by_loop else "alone",
        "ratio_to_baseline": None,
        "compile_s": round(clock.seconds, 3),
        "compile_phases_s": {name: round(seconds, 3) for name, seconds in clock.phases.items()},
        "apply_s": round(apply_s, 3),
        "start_s": round(start_s, 3),
        "warmup_calls": len(warm),
        "peak_memory_bytes": {"load": load_peak, "run": run_peak},
        "image_difference": difference(image, Image.open(job.reference)) if job.reference else None,
        "environment": {**machine, "before": before, "after": after},
        "command": job.command,
        "started_at": started_at,
    }


def denoising_ms(seconds: dict[str, list[float]], steps: int, by_loop: bool = False) -> tuple[list[float], list[float]]:
    """Milliseconds of each denoising loop, and of each step, by a `StageTimer`'s seconds of calls of so many steps.

    by_loop, and where the loop is one range: a step's are its share, the loop's by their number.
    """
    if ranges.DENOISING_LOOP in seconds:
        loops = [1000 * loop for loop in seconds[ranges.DENOISING_LOOP]]
        return loops, [loop / steps for loop in loops]
    each = [1000 * step for step in seconds[ranges.DENOISING_STEP]]
    loops = [sum(each[i : i + steps]) for i in range(0, len(each), steps)]
    return loops, [loop / steps for loop in loops] if by_loop else each


def trace(call: Any, path: Path, stacks: bool, device: torch.device) -> None:
    """Profile one call and write a Chrome trace, gzipped where the name says so."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities, record_shapes=True, with_stack=stacks) as profile:
        call()
        synchronize(device)
    opened = gzip.open if path.suffix == ".gz" else open
    with tempfile.NamedTemporaryFile(suffix=".json") as plain, replacing(path) as temporary:
        profile.export_chrome_trace(plain.name)
        with open(plain.name, "rb") as source, opened(temporary, "wb") as target:
            shutil.copyfileobj(source, target)


def main() -> None:
    job = Job.from_json(sys.argv[1])
    results.write(job.result, measure(job))


if __name__ == "__main__":
    run_command(main, debug="--debug" in sys.argv)
