"""Machine code of CUDA C++ kernels in packages: what a package's models launch is in it, and isn't compiled again."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import recipes
from export import checks
from export.store import PackageStore
from recipes import Recipe
from recipes.kernels import cuda_kernel
from recipes.kernels.cuda_kernel import CudaKernel
from utils.errors import UserError

AFTER = CudaKernel("wgmma_linear.cu", "wgmma_linear", "sm_90a", 0, (("DEEP", 0), ("UPDATE", 0)))
FAST = Recipe(
    dtype="bfloat16", execution="aoti", fused_qkv=True, quantization="float8_per_row", attention="wgmma_fp8",
    fused_kernels=True, gemm_epilogues=True,
)  # fmt: skip


@pytest.fixture(autouse=True)
def _nothing_compiled(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setattr(cuda_kernel, "_code", {})
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("inductor")))


def records(package: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(package) as archive:
        found = {name: archive.read(name) for name in archive.namelist()}
    return {Path(name).stem: content for name, content in found.items() if Path(name).parent.name == "kernels"}


def test_key_is_of_all_that_it_is_made_from(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    other = [
        replace(AFTER, defines=(("DEEP", 1), ("UPDATE", 0))),
        replace(AFTER, arch="sm_90"),
        replace(AFTER, name="another"),
    ]
    for file in ("wgmma_linear.cu", "hopper.cuh"):
        (tmp_path / file).write_text("// a source")
    assert len({AFTER.key, *(one.key for one in other)}) == 4
    before = AFTER.key
    monkeypatch.setattr(cuda_kernel, "_FOLDER", tmp_path)
    changed = replace(AFTER).key
    (tmp_path / "hopper.cuh").write_text("// another header")
    assert len({before, changed, replace(AFTER).key}) == 3


def test_what_was_provided_is_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []
    monkeypatch.setattr(cuda_kernel, "_compiled", lambda kernel: compiled.append(kernel) or b"compiled")
    other = replace(AFTER, name="another")
    cuda_kernel.provide({AFTER.key: b"provided"})
    assert [cuda_kernel.machine_code(one) for one in (AFTER, other, other)] == [b"provided", b"compiled", b"compiled"]
    assert compiled == [other]
    cuda_kernel.provide({other.key: b"provided"})
    assert cuda_kernel.machine_code(other) == b"compiled", "as it may be loaded already"


def test_what_was_compiled_is_kept_for_other_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(kernel: CudaKernel) -> bytes:
        raise UserError("doesn't compile")

    monkeypatch.setattr(cuda_kernel, "_compiled", fails)
    with pytest.raises(UserError, match="doesn't compile"):
        cuda_kernel.machine_code(AFTER)
    monkeypatch.setattr(cuda_kernel, "_compiled", lambda kernel: b"compiled")
    assert cuda_kernel.machine_code(AFTER) == b"compiled"
    monkeypatch.setattr(cuda_kernel, "_compiled", fails)
    cuda_kernel._code.clear()  # as in another process
    assert cuda_kernel.machine_code(AFTER) == b"compiled"
    place = cuda_kernel._place(AFTER)
    for damaged in (place.read_bytes()[:-1], b""):
        place.write_bytes(damaged)
        cuda_kernel._code.clear()
        with pytest.raises(UserError, match="doesn't compile"):
            cuda_kernel.machine_code(AFTER)


@pytest.mark.slow
def test_a_package_holds_what_its_verification_launched(
    tiny: Callable, predict: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def used() -> Iterator[set[CudaKernel]]:
        yield {AFTER}  # on a CPU none is

    monkeypatch.setattr(cuda_kernel, "used", used)
    cuda_kernel.provide({AFTER.key: b"machine code"})
    pipe = tiny()
    recipes.apply(pipe, Recipe(execution="aoti"), PackageStore(tmp_path))
    expected = predict(pipe)
    (entry,) = PackageStore(tmp_path).entries()
    assert records(entry.path) == {AFTER.key: b"machine code"}
    assert checks.refusal(entry) is None
    cuda_kernel._code.clear()
    again = tiny()
    recipes.apply(again, Recipe(execution="aoti"), PackageStore(tmp_path, build=False))
    assert torch.equal(predict(again), expected)
    assert cuda_kernel._code == {AFTER.key: b"machine code"}


@pytest.mark.gpu
@pytest.mark.slow
def test_no_compiler_is_needed(
    tiny: Callable, predict: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = torch.device("cuda")
    if (refusal := recipes.refusal(FAST, device)) is not None:
        pytest.skip(refusal)
    pipe = tiny(torch.bfloat16, device)
    recipes.apply(pipe, FAST, PackageStore(tmp_path))
    expected = predict(pipe)
    (entry,) = PackageStore(tmp_path).entries()
    held = records(entry.path)
    assert {key.rpartition("-")[0] for key in held} == {"wgmma_attention", "wgmma_linear"}

    def compiled(kernel: CudaKernel) -> bytes:
        raise AssertionError(f"compiles {kernel}")

    monkeypatch.setattr(cuda_kernel, "_compiled", compiled)
    cuda_kernel._code.clear()
    cuda_kernel._loaded.cache_clear()  # as in another process
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "empty"))
    again = tiny(torch.bfloat16, device)
    recipes.apply(again, FAST, PackageStore(tmp_path, build=False))
    assert torch.equal(predict(again), expected)
    assert cuda_kernel._code == held
