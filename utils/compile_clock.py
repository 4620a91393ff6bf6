"""Seconds spent compiling, whoever asked for it: torch.compile at a first call, or an ahead-of-time build."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager

from torch._dynamo.callback import CallbackArgs, CallbackTrigger, callback_handler
from torch._dynamo.utils import compilation_time_metrics
from tqdm import tqdm

# What Inductor's kernels do at their first launch, after the compilation that Dynamo reports: try their configurations.
_AT_FIRST_LAUNCH = ("CachingAutotuner.benchmark_all_configs", "CachingAutotuner.coordinate_descent_tuning")
_WORTH_TELLING = 0.1  # seconds


def compilation(name: str) -> AbstractContextManager:
    """Count the body as a compilation, as Dynamo counts its own; `name` begins with no digit, as Dynamo's do."""
    return callback_handler.install_callbacks(CallbackTrigger.DYNAMO, name)


class CompileClock:
    """While entered, adds up the wall-clock `seconds` and the number of `compilations` (nested ones count once).

    `seconds` holds the autotuning of kernels at their first launch too. `phases`: where the seconds went, by PyTorch's
    own names for the parts of compiling that took 0.1 s or more; one part may lie within another. `named`: seconds by
    the name that `compilation` was given. progress: a bar on stderr, which says which of these is under way.
    """

    def __init__(self, progress: bool = False):
        self.seconds, self.compilations = 0.0, 0
        self.phases: dict[str, float] = {}
        self.named: dict[str, float] = {}
        self._progress, self._bar, self._started = progress, None, 0.0
        self._before: dict[str, float] = {}
        self._launching_before = 0.0

    def __enter__(self) -> CompileClock:
        callback_handler.register_start_callback(self._start)
        callback_handler.register_end_callback(self._end)
        self._before, self._launching_before = _phases(), _first_launches()
        return self

    def __exit__(self, *exception: object) -> None:
        callback_handler.remove_start_callback(self._start)
        callback_handler.remove_end_callback(self._end)
        self._count_launches()
        spent = {name: seconds - self._before.get(name, 0.0) for name, seconds in _phases().items()}
        self.phases = {name: seconds for name, seconds in spent.items() if seconds >= _WORTH_TELLING}
        if self._bar is not None:
            self._bar.close()

    def _start(self, what: CallbackArgs) -> None:
        self._count_launches()
        self._started = time.perf_counter()
        if not self._progress:
            return
        description = f"compiling {what.compile_id}" if _is_named(what) else "compiling"
        if self._bar is None:
            self._bar = tqdm(desc=description, unit=" graphs", bar_format="{desc}: {n}{unit} done, {elapsed}")
        else:
            self._bar.set_description_str(description)

    def _end(self, what: CallbackArgs) -> None:
        seconds = time.perf_counter() - self._started
        self.seconds += seconds
        self.compilations += 1
        if _is_named(what):
            self.named[what.compile_id] = self.named.get(what.compile_id, 0.0) + seconds
        self._launching_before = _first_launches()  # those within the compilation are in its seconds
        if self._bar is not None:
            self._bar.update()

    def _count_launches(self) -> None:
        """Add the first launches since the last compilation."""
        now = _first_launches()
        self.seconds += now - self._launching_before
        self._launching_before = now


def _is_named(what: CallbackArgs) -> bool:
    """Whether it is one of `compilation`'s: Dynamo's own are numbers, "3/0"."""
    return not what.compile_id[:1].isdigit()


def _phases() -> dict[str, float]:
    return {name: sum(seconds) for name, seconds in compilation_time_metrics.items()}


def _first_launches() -> float:
    return sum(sum(compilation_time_metrics.get(name, ())) for name in _AT_FIRST_LAUNCH)
