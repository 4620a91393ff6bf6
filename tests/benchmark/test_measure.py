"""What is made of a call's stage times."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import recipes
from benchmark.measure import denoising_ms
from recipes import Recipe, loop_graph
from utils.ranges import watch
from utils.timing import StageTimer


@pytest.mark.parametrize("whole", [False, True], ids=["steps", "loop"])
def test_loops_and_steps_of_real_calls(tiny: Callable, draw: Callable, whole: bool) -> None:
    pipe, timer = tiny(), StageTimer(torch.device("cpu"))
    recipes.apply(pipe, Recipe(scheduler_sync_removal=True))
    if whole:
        loop_graph.OPTIMIZATION.apply(pipe, Recipe())
    with watch(pipe, timer.range):
        draw(pipe, steps=3)
        draw(pipe, steps=3)
    loops, steps = denoising_ms(timer.seconds, 3)
    assert len(loops) == 2
    assert all(loop > 0 for loop in loops)
    if whole:
        assert steps == [loop / 3 for loop in loops]
        assert [1000 * seconds for seconds in timer.seconds["denoising_loop"]] == loops
        assert "denoising_step" not in timer.seconds
    else:
        assert [sum(steps[:3]), sum(steps[3:])] == loops
        assert [1000 * seconds for seconds in timer.seconds["denoising_step"]] == steps
        assert denoising_ms(timer.seconds, 3, by_loop=True) == (loops, [loop / 3 for loop in loops])
