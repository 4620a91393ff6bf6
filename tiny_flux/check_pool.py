"""Processes for the checker, which takes 15 ms of a core for an image."""

from __future__ import annotations

import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context


def check_pool(share: int = 1) -> ProcessPoolExecutor:
    """A process a core, or for every `share` cores; `with` ends them. Spawned: a process with a GPU can't be forked."""
    return ProcessPoolExecutor(max(1, len(os.sched_getaffinity(0)) // share), mp_context=get_context("spawn"))
