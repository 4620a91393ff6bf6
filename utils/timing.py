"""Wall-clock times of device work, and what can be said of them."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch

WARM_WITHIN = 0.03
WARM_UP_AT_MOST = 10


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(call: Callable[[], object], device: torch.device) -> float:
    """Seconds that `call` takes, the device idle before and after."""
    synchronize(device)
    started = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - started


def warm_up(call: Callable[[int], object], device: torch.device) -> list[float]:
    """Call `call(0)`, `call(1)`, ... until two in a row agree within 3 %, ten times at most; their seconds."""
    seconds: list[float] = []
    while len(seconds) < WARM_UP_AT_MOST:
        seconds.append(timed(lambda: call(len(seconds)), device))
        if len(seconds) > 1 and abs(seconds[-1] - seconds[-2]) <= WARM_WITHIN * seconds[-2]:
            break
    return seconds


def summary(values: Sequence[float]) -> dict[str, float]:
    """Median, 10th and 90th percentile (linear interpolation)."""
    low, median, high = np.percentile(values, (10, 50, 90))
    return {"median": float(median), "p10": float(low), "p90": float(high)}


def bootstrap_ratio(numerator: Sequence[float], denominator: Sequence[float], draws: int = 10_000) -> dict[str, float]:
    """Ratio of medians with its 95 % percentile bootstrap interval (Efron 1979), both samples resampled.

    The seed is fixed: the same samples give the same interval.
    """
    random = np.random.default_rng(0)

    def medians(sample: Sequence[float]) -> np.ndarray:
        values = np.asarray(sample)
        return np.median(values[random.integers(len(values), size=(draws, len(values)))], axis=1)

    low, high = np.percentile(medians(numerator) / medians(denominator), (2.5, 97.5))
    return {"value": float(np.median(numerator) / np.median(denominator)), "low": float(low), "high": float(high)}


class StageTimer:
    """Seconds by stage: `timer.range` is what `utils.ranges.watch` enters. Synchronises the device at every border."""

    def __init__(self, device: torch.device):
        self.device = device
        self.seconds: dict[str, list[float]] = defaultdict(list)

    @contextmanager
    def range(self, stage: str) -> Iterator[None]:
        synchronize(self.device)
        started = time.perf_counter()
        yield
        synchronize(self.device)
        self.seconds[stage].append(time.perf_counter() - started)
