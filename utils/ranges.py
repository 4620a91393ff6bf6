"""The stages of a diffusers pipeline call, watched from outside: for profiler traces and for stage times.

Nothing of the pipeline's class is known beyond diffusers' conventions: `encode_prompt`, `scheduler`, `vae.decode`,
`image_processor.postprocess`. A denoising step lasts from the end of the one before (the first: from the scheduler's
`set_begin_index`, or `set_timesteps` where the pipeline doesn't call that) to the end of `scheduler.step`; where a
user interrupts the call, the last one ends with the next stage. A pipeline
whose steps can't be told apart from outside says so by its class's `denoising_range`: one range, DENOISING_LOOP.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from diffusers import DiffusionPipeline

DENOISING_STEP, DENOISING_LOOP = "denoising_step", "denoising_loop"
STAGES = ("prompt_encoding", DENOISING_STEP, "decoding", "postprocessing")
SCHEDULER_STEP = "scheduler_step"
Range = Callable[[str], AbstractContextManager]


@contextmanager
def annotate(pipe: DiffusionPipeline) -> Iterator[None]:
    """In the body, every call of `pipe` leaves the ranges STAGES in a profiler trace; undone afterwards.

    Within each denoising step, the scheduler's part is the range SCHEDULER_STEP; a DENOISING_LOOP has none.
    """
    step = pipe.scheduler.step

    @functools.wraps(step)  # pipelines look at its signature
    def scheduled(*args: Any, **kwargs: Any) -> Any:
        with torch.profiler.record_function(SCHEDULER_STEP):
            return step(*args, **kwargs)

    with ExitStack() as stack:
        if _denoising_range(pipe) == DENOISING_STEP:
            stack.enter_context(_replaced(pipe.scheduler, "step", scheduled))
        stack.enter_context(watch(pipe, torch.profiler.record_function))
        yield


@contextmanager
def watch(pipe: DiffusionPipeline, enter: Range) -> Iterator[None]:
    """In the body, every call of `pipe` runs its stages inside `enter(stage)`; undone afterwards."""
    with ExitStack() as stack:
        start = "set_begin_index" if _calls(pipe, "set_begin_index") else "set_timesteps"
        steps = _watch_steps(pipe.scheduler, start, lambda: enter(_denoising_range(pipe)))
        end_step = stack.enter_context(steps)

        def wrap(owner: Any, name: str, stage: str) -> None:
            original = getattr(owner, name, None)
            if original is None:
                return

            @functools.wraps(original)
            def watched(*args: Any, **kwargs: Any) -> Any:
                if getattr(pipe, "_interrupt", False):  # as diffusers calls it; steps may be left
                    end_step()
                with enter(stage):
                    return original(*args, **kwargs)

            stack.enter_context(_replaced(owner, name, watched))

        wrap(pipe, "encode_prompt", "prompt_encoding")
        if getattr(pipe, "vae", None) is not None:
            wrap(pipe.vae, "decode", "decoding")
        wrap(getattr(pipe, "image_processor", None), "postprocess", "postprocessing")
        yield


def _denoising_range(pipe: DiffusionPipeline) -> str:
    return getattr(pipe, "denoising_range", DENOISING_STEP)


def _calls(pipe: DiffusionPipeline, name: str) -> bool:
    """Whether calling `pipe` calls something of this name of its scheduler: it, or a class that its own extends.

    Where it starts from an image, `get_timesteps` does, after it has left out the first steps.
    """
    if not hasattr(pipe.scheduler, name):
        return False
    names = ("__call__", "get_timesteps")
    calls = [vars(kind)[method] for kind in type(pipe).__mro__ for method in names if method in vars(kind)]
    return any(name in inspect.unwrap(call).__code__.co_names for call in calls)


@contextmanager
def _watch_steps(
    scheduler: Any, start: str, enter: Callable[[], AbstractContextManager]
) -> Iterator[Callable[[], None]]:
    """Ranges from the end of `scheduler.<start>` over the ends of `scheduler.step`, as many as there are timesteps
    from the one that `set_begin_index` names. Yields what ends the one that is open, if one is."""
    current: AbstractContextManager | None = None
    left = 0

    def close() -> None:
        nonlocal current
        if current is not None:
            current.__exit__(None, None, None)
            current = None

    def open_next() -> None:
        nonlocal current
        current = enter()
        current.__enter__()

    def begin(original: Callable) -> Callable:
        @functools.wraps(original)
        def watched(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            close()  # of a call that was broken off
            result = original(*args, **kwargs)
            first = inspect.signature(original).bind(*args, **kwargs).arguments.get("begin_index", 0)
            left = len(scheduler.timesteps) - first
            open_next()
            return result

        return watched

    def step(original: Callable) -> Callable:
        @functools.wraps(original)
        def watched(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            result = original(*args, **kwargs)
            close()
            left -= 1
            if left > 0:
                open_next()
            return result

        return watched

    with ExitStack() as stack:
        stack.enter_context(_replaced(scheduler, start, begin(getattr(scheduler, start))))
        stack.enter_context(_replaced(scheduler, "step", step(scheduler.step)))
        try:
            yield close
        finally:
            close()


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """`owner.name` is `value` in the body, as an attribute of the object, not of its class."""
    own = vars(owner)
    before = own.get(name)
    had = name in own
    object.__setattr__(owner, name, value)
    try:
        yield
    finally:
        if had:
            object.__setattr__(owner, name, before)
        else:
            object.__delattr__(owner, name)
