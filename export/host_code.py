"""The C++ around a model's kernels, compiled for every processor that the package is for.

Inductor compiles for the very processor (`-march=native`); where another of the same kind lacks an instruction set that
the package's identity doesn't name, it would end at an illegal instruction. Here the compiler is given what the
identity names (`export.manifest.cpu_arch`), by flags that Inductor has for each instruction set. With a GPU it is given
none: the host does nothing but launch, and needn't wait half a minute while Inductor tries each of them out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch._inductor import config, cpp_builder, cpu_vec_isa
from torch._inductor.codegen.cpp_wrapper_cpu import CppWrapperCpu


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
            declaring = told_apart(CppWrapperCpu.codegen_int_array_var)
            undo.enter_context(patch.object(CppWrapperCpu, "codegen_int_array_var", declaring))
        if device.type == "cuda":
            undo.enter_context(patch.object(cpu_vec_isa, "valid_vec_isa_list", list))
        yield options


def told_apart(declaring: Callable[..., str]) -> Callable[..., str]:
    """`codegen_int_array_var`, which declares an array once for each place that lines are written to.

    PyTorch 2.11 tells places apart by the id of a bound method, which ends with the call, so that another place's may
    have the same: then a model, now and then, reads an array that is declared further down, and doesn't compile. Here
    a place's method is kept as long as what generates the code.
    """

    def of_place(self: Any, int_array: str, writeline: Any, *args: Any, **kwargs: Any) -> str:
        kept = self.__dict__.setdefault("_flux_fast_places", {})
        place = id(getattr(writeline, "__self__", writeline)), getattr(writeline, "__func__", None)
        return declaring(self, int_array, kept.setdefault(place, writeline), *args, **kwargs)

    return of_place


def _without_march(compiling: list[str], linking: list[str]) -> tuple[list[str], list[str]]:
    return [flag for flag in compiling if not flag.startswith("march=")], linking
