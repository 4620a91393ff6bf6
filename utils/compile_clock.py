"""Seconds spent compiling, whoever asked for it: torch.compile at a first call, or an ahead-of-time build."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager

from torch._dynamo.callback import CallbackArgs, CallbackTrigger, callback_handler
from tqdm import tqdm


def compilation(name: str) -> AbstractContextManager:
    """Count the body as a compilation, as Dynamo counts its own."""
    return callback_handler.install_callbacks(CallbackTrigger.DYNAMO, name)


class CompileClock:
    """While entered, adds up the wall-clock `seconds` and the number of `compilations` (nested ones count once)."""

    def __init__(self, progress: bool = False):
        self.seconds, self.compilations = 0.0, 0
        self._progress, self._bar, self._started = progress, None, 0.0

    def __enter__(self) -> CompileClock:
        callback_handler.register_start_callback(self._start)
        callback_handler.register_end_callback(self._end)
        return self

    def __exit__(self, *exception: object) -> None:
        callback_handler.remove_start_callback(self._start)
        callback_handler.remove_end_callback(self._end)
        if self._bar is not None:
            self._bar.close()

    def _start(self, _: CallbackArgs) -> None:
        self._started = time.perf_counter()
        if self._progress and self._bar is None:
            self._bar = tqdm(desc="compiling", unit=" graphs", bar_format="{desc}: {n}{unit}, {elapsed}")

    def _end(self, _: CallbackArgs) -> None:
        self.seconds += time.perf_counter() - self._started
        self.compilations += 1
        if self._bar is not None:
            self._bar.update()
