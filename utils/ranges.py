"""The stages of a diffusers pipeline call, watched from outside: for profiler traces and for stage times.

Nothing of the pipeline's class is known beyond diffusers' conventions: `encode_prompt`, `scheduler`, `vae.decode`,
`image_processor.postprocess`. A denoising step lasts from the end of the one before (the first: from the scheduler's
`set_begin_index`, or `set_timesteps` where the pipeline doesn't call that) to the end of `scheduler.step`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from diffusers import DiffusionPipeline

STAGES = ("prompt_encoding", "denoising_step", "decoding", "postprocessing")
SCHEDULER_STEP = "scheduler_step"
Range = Callable[[str], AbstractContextManager]


@contextmanager
def annotate(pipe: DiffusionPipeline) -> Iterator[None]:
    """In the body, every call of `pipe` leaves the ranges STAGES in a profiler trace; undone afterwards.

    Within each denoising step, the scheduler's part is the range SCHEDULER_STEP.
    """
    step = pipe.scheduler.step

    def scheduled(*args: Any, **kwargs: Any) -> Any:
        with torch.profiler.record_function(SCHEDULER_STEP):
            return step(*args, **kwargs)

    with _replaced(pipe.scheduler, "step", scheduled), watch(pipe, torch.profiler.record_function):
        yield


@contextmanager
def watch(pipe: DiffusionPipeline, enter: Range) -> Iterator[None]:
    """In the body, every call of `pipe` runs its stages inside `enter(stage)`; undone afterwards."""
    with ExitStack() as stack:

        def wrap(owner: Any, name: str, stage: str) -> None:
            original = getattr(owner, name, None)
            if original is None:
                return

            def watched(*args: Any, **kwargs: Any) -> Any:
                with enter(stage):
                    return original(*args, **kwargs)

            stack.enter_context(_replaced(owner, name, watched))

        wrap(pipe, "encode_prompt", "prompt_encoding")
        if getattr(pipe, "vae", None) is not None:
            wrap(pipe.vae, "decode", "decoding")
        wrap(getattr(pipe, "image_processor", None), "postprocess", "postprocessing")
        called = inspect.unwrap(type(pipe).__call__).__code__.co_names
        start = "set_begin_index" if "set_begin_index" in called else "set_timesteps"
        stack.enter_context(_watch_steps(pipe.scheduler, start, enter))
        yield


@contextmanager
def _watch_steps(scheduler: Any, start: str, enter: Range) -> Iterator[None]:
    """Ranges from the end of `scheduler.<start>` over the ends of `scheduler.step`, as many as there are timesteps."""
    current: AbstractContextManager | None = None
    left = 0

    def close() -> None:
        nonlocal current
        if current is not None:
            current.__exit__(None, None, None)
            current = None

    def open_next() -> None:
        nonlocal current
        current = enter("denoising_step")
        current.__enter__()

    def begin(original: Callable) -> Callable:
        def watched(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            close()  # of a call that was broken off
            result = original(*args, **kwargs)
            left = len(scheduler.timesteps)
            open_next()
            return result

        return watched

    def step(original: Callable) -> Callable:
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
            yield
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
