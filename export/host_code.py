"""The C++ around a model's kernels, compiled for every processor that the package is for.

Inductor compiles for the very processor (`-march=native`); where another of the same kind lacks an instruction set that
the package's identity doesn't name, it would end at an illegal instruction. Here the compiler is given what the
identity names (`export.manifest.cpu_arch`), by flags that Inductor has for each instruction set. With a GPU it is given
none: the host does nothing but launch, and needn't wait half a minute while Inductor tries each of them out.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch._inductor import config, cpp_builder, cpu_vec_isa


@contextmanager
def portable(device: torch.device) -> Iterator[dict[str, Any]]:
    """Inductor's configuration entries for models on `device`, to be compiled within."""
    options: dict[str, Any] = {}
    with ExitStack() as undo:
        if hasattr(config.cpp, "march"):
            options["cpp.march"] = ""
        else:  # before PyTorch 2.13
            flags = cpp_builder._get_optimization_cflags
            without = patch.object(cpp_builder, "_get_optimization_cflags", lambda *args: _without_march(*flags(*args)))
            undo.enter_context(without)
        if device.type == "cuda":
            undo.enter_context(patch.object(cpu_vec_isa, "valid_vec_isa_list", list))
        yield options


def _without_march(compiling: list[str], linking: list[str]) -> tuple[list[str], list[str]]:
    return [flag for flag in compiling if not flag.startswith("march=")], linking
