"""Running out of memory: said with the moment, and with the options that would lower what the recipe takes."""

from __future__ import annotations

import gc
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import recipes
from export.store import PackageStore
from recipes import Recipe, float8
from utils import checkpoints, cuda_bindings, errors
from utils.errors import OutOfMemoryError, UserError, advising, is_out_of_memory, run_command
from utils.request import Request

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
BF16 = Recipe(dtype="bfloat16")
LEAST = replace(BF16, quantization="float8_per_row", modulation="offloaded", float8_text_encoder=True)
SMALLEST = Request("a red circle", 16, 16, 1, 0.0, 64)
EMPTY = "CUDA out of memory. Tried to allocate 20.00 MiB."


def run_out(*_: object, **__: object) -> None:
    raise torch.OutOfMemoryError(EMPTY)


@pytest.mark.parametrize(
    ("recipe", "capability", "words"),
    [
        (Recipe(), (9, 0), "a recipe with dtype=bfloat16 or modulation=offloaded"),
        (BF16, (8, 0), "a recipe with modulation=offloaded"),
        (
            replace(BF16, modulation="hoisted"),
            (9, 0),
            "a recipe with quantization=float8_per_row or modulation=offloaded or float8_text_encoder=true",
        ),
        (replace(LEAST, modulation="per_step"), (9, 0), "a recipe with modulation=offloaded"),
        (replace(LEAST, quantization="float8_per_tensor"), (9, 0), None),
        (replace(LEAST, float8_text_encoder=False), (9, 0), "a recipe with float8_text_encoder=true"),
        (LEAST, (9, 0), None),
    ],
)
def test_what_a_recipe_has_not_yet(pretend_gpu: Callable, recipe: Recipe, capability: tuple, words: str | None) -> None:
    pretend_gpu(capability)
    assert recipes.saving_memory(recipe, CUDA) == words


def test_what_a_cpu_only_emulates_is_no_advice() -> None:
    assert recipes.saving_memory(Recipe(), CPU) == "a recipe with dtype=bfloat16"
    assert recipes.saving_memory(BF16, CPU) is None


@pytest.mark.parametrize(
    ("recipe", "request_", "advice"),
    [
        (Recipe(), SMALLEST, "use a recipe with dtype=bfloat16"),
        (Recipe(), replace(SMALLEST, batch=2), "use a smaller --batch, or a recipe with dtype=bfloat16"),
        (BF16, replace(SMALLEST, batch=2, height=32, width=32), "use a smaller --batch or --height or --width"),
        (BF16, replace(SMALLEST, width=32), "use a smaller --width"),
        (BF16, SMALLEST, "use a device with more memory free"),
    ],
)
def test_while_drawing(tiny: Callable, recipe: Recipe, request_: Request, advice: str) -> None:
    pipe = tiny()
    recipes.apply(pipe, recipe)
    hook = pipe.transformer.proj_out.register_forward_pre_hook(run_out)
    with pytest.raises(OutOfMemoryError, match=f"^out of memory while drawing: {re.escape(advice)}$") as raised:
        request_.run(pipe)
    assert isinstance(raised.value.__cause__, torch.OutOfMemoryError), "for --debug"
    hook.remove()
    assert len(request_.run(pipe)) == request_.batch


@pytest.mark.parametrize(
    ("dtype", "advice"),
    [
        (torch.float32, "use a recipe with dtype=bfloat16"),
        (
            torch.bfloat16,
            "all weights are loaded before a recipe makes them smaller: use a device with more memory free",
        ),
    ],
)
def test_while_loading(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, advice: str) -> None:
    monkeypatch.setattr(torch.nn.Module, "to", run_out)
    with pytest.raises(OutOfMemoryError, match=f"^out of memory while loading: {re.escape(advice)}$"):
        checkpoints.load("tiny", dtype, CPU, progress=False)


def test_while_applying(tiny: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(float8, "quantize", run_out)
    words = "^out of memory while applying the recipe: use a device with more memory free$"
    with pytest.raises(OutOfMemoryError, match=words):
        recipes.apply(tiny(), replace(BF16, quantization="float8_per_row"))


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(UserError, match=r"^something else$"), advising("while testing", lambda: "never asked"):
        raise UserError("something else")


def test_the_innermost_moment_is_told() -> None:
    with (
        pytest.raises(OutOfMemoryError, match=r"^out of memory inside: this$") as raised,
        advising("outside", lambda: "that"),
        advising("inside", lambda: "this"),
    ):
        raise MemoryError
    assert is_out_of_memory(raised.value)


@pytest.mark.parametrize(
    "words",
    [
        EMPTY,
        "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory",
    ],
)
def test_memory_that_others_than_pytorch_ask_for(words: str) -> None:
    with pytest.raises(OutOfMemoryError, match=r"^out of memory here: this$"), advising("here", lambda: "this"):
        raise RuntimeError(words)


CALL = "aoti_torch_empty_strided(2, ints, ints, dtype, device, 0, &handle) API call failed at a.cpp, line 7"


@pytest.mark.parametrize("before", [0, 2])
def test_a_package_says_only_which_call_failed(monkeypatch: pytest.MonkeyPatch, before: int) -> None:
    refused = iter((before, before + 1, before, before))
    monkeypatch.setattr(errors, "refused", lambda: next(refused))
    with pytest.raises(OutOfMemoryError, match=r"^out of memory here: this$"), advising("here", lambda: "this"):
        raise RuntimeError(CALL)
    with pytest.raises(RuntimeError, match="API call failed"), advising("here", lambda: "this"):
        raise RuntimeError(CALL)  # for another reason


def test_a_drivers_call_for_want_of_memory() -> None:
    class Driver:
        @staticmethod
        def load(code: bytes) -> tuple[Any, None]:
            return SimpleNamespace(name=code.decode(), value=2), None

    with pytest.raises(MemoryError, match=r"^a kernel: load failed with CUDA_ERROR_OUT_OF_MEMORY$"):
        cuda_bindings.call(Driver, "load", b"CUDA_ERROR_OUT_OF_MEMORY", what="a kernel")
    with pytest.raises(UserError, match=r"^a kernel: load failed with CUDA_ERROR_NO_DEVICE$"):
        cuda_bindings.call(Driver, "load", b"CUDA_ERROR_NO_DEVICE", what="a kernel")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            OutOfMemoryError("out of memory while drawing: use a smaller --batch"),
            "while drawing: use a smaller --batch",
        ),
        (torch.OutOfMemoryError(EMPTY), "(--debug shows where)"),
    ],
)
def test_a_command_ends_on_it(error: Exception, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise error

    with pytest.raises(SystemExit) as ended:
        run_command(fail, debug=False)
    assert ended.value.code == 1
    said = capsys.readouterr().err
    assert said.startswith("error: out of memory")
    assert said.endswith(f"{line}\n")


@pytest.fixture
def little_memory() -> Iterator[Callable[[float], None]]:
    """little_memory(bytes): so much of the GPU's memory is left to this process, besides what it holds."""

    def leave(size: float) -> None:
        gc.collect()
        torch.cuda.empty_cache()
        allowed = torch.cuda.memory_reserved() + size
        torch.cuda.set_per_process_memory_fraction(allowed / torch.cuda.get_device_properties(0).total_memory)

    yield leave
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.empty_cache()


@pytest.mark.gpu
@pytest.mark.parametrize(
    "recipe",
    [
        BF16,
        replace(BF16, scheduler_sync_removal=True, cuda_graph=True),
        pytest.param(replace(BF16, execution="aoti"), marks=pytest.mark.slow),
        pytest.param(
            replace(BF16, scheduler_sync_removal=True, cuda_graph=True, execution="aoti"), marks=pytest.mark.slow
        ),
    ],
    ids=["eager", "graph", "packages", "packages-graph"],
)
def test_peak_on_a_gpu(tiny: Callable, little_memory: Callable, tmp_path: Path, recipe: Recipe) -> None:
    large = Request("a red circle", 1024, 1024, 1, 0.0, 64, batch=4)
    if recipe.execution == "aoti":
        pipe = tiny(torch.bfloat16, CUDA)
        recipes.apply(pipe, replace(recipe, cuda_graph=False), PackageStore(tmp_path))
        for request in (large, SMALLEST):
            request.run(pipe)
        del pipe
    pipe = tiny(torch.bfloat16, CUDA)
    recipes.apply(pipe, recipe, PackageStore(tmp_path, build=False))
    words = (
        r"^out of memory while drawing \(peak \d+\.\d GiB on .+\): use a smaller --batch or --height or --width, or a"
    )
    little_memory(100e6)
    with pytest.raises(OutOfMemoryError, match=words):
        large.run(pipe)
    little_memory(800e6)
    assert len(SMALLEST.run(pipe)) == 1, "the pipeline is as it was"
