"""Timing: warming up, summaries, and the interval of a ratio."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch

from utils import timing
from utils.timing import StageTimer, bootstrap_ratio, summary, timed, warm_up

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("seconds", "calls"),
    [
        ([5.0, 1.0, 0.98], 3),  # within 3 %
        ([1.0, 1.029], 2),
        ([1.0, 1.04, 1.0, 1.01], 4),
        ([1.0, 2.0] * 10, 10),  # never: ten at most
    ],
)
def test_warm_up_stops(monkeypatch: pytest.MonkeyPatch, seconds: list[float], calls: int) -> None:
    given: list[int] = []

    def clock(call, device) -> float:
        call()
        return seconds[len(given) - 1]

    monkeypatch.setattr(timing, "timed", clock)
    assert warm_up(given.append, CPU) == seconds[:calls]
    assert given == list(range(calls)), "each call gets its number"


def test_timed_measures_wall_clock() -> None:
    assert 0.05 <= timed(lambda: time.sleep(0.05), CPU) < 0.5


def test_summary() -> None:
    assert summary(range(1, 12)) == {"median": 6.0, "p10": 2.0, "p90": 10.0}
    assert summary([3.0]) == {"median": 3.0, "p10": 3.0, "p90": 3.0}


def test_bootstrap_ratio_of_constants_is_exact() -> None:
    assert bootstrap_ratio([2.0] * 5, [1.0] * 7) == {"value": 2.0, "low": 2.0, "high": 2.0}


def test_bootstrap_ratio_covers_the_truth_about_95_percent_of_the_time() -> None:
    random = np.random.default_rng(0)
    hits = 0
    for _ in range(200):
        slow, fast = random.normal(2.0, 0.1, 20), random.normal(1.0, 0.05, 20)
        ratio = bootstrap_ratio(slow, fast, draws=500)
        assert ratio["low"] <= ratio["value"] <= ratio["high"]
        hits += ratio["low"] <= 2.0 <= ratio["high"]
    assert 176 <= hits <= 199  # 95 % of 200 is 190


def test_bootstrap_ratio_narrows_with_more_runs_and_repeats_itself() -> None:
    random = np.random.default_rng(0)
    few, many = random.normal(1.0, 0.1, 10), random.normal(1.0, 0.1, 1000)
    width = {len(sample): (r := bootstrap_ratio(sample, sample))["high"] - r["low"] for sample in (few, many)}
    assert width[1000] < width[10] / 3
    assert bootstrap_ratio(few, many) == bootstrap_ratio(few, many)


def test_stage_timer_collects_by_stage() -> None:
    timer = StageTimer(CPU)
    for _ in range(2):
        with timer.range("decoding"):
            time.sleep(0.01)
    assert len(timer.seconds["decoding"]) == 2
    assert min(timer.seconds["decoding"]) >= 0.01
