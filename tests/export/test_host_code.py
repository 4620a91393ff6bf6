"""What the compiler may use of this processor: no more than a package's identity names."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch._inductor import cpp_builder
from torch._inductor.cpu_vec_isa import invalid_vec_isa, pick_vec_isa

from export.build import Call, compile_call
from export.host_code import portable
from export.manifest import cpu_arch
from export.regions import AFTER

pytestmark = pytest.mark.slow  # both compile
CUDA = torch.device("cuda")


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """The compiler's command lines, of nothing compiled before."""
    found: list[str] = []
    run = cpp_builder._run_compile_cmd

    def record(command: str, folder: str) -> None:
        found.append(command)
        run(command, folder)

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(cpp_builder, "_run_compile_cmd", record)
    return found


def test_a_cpus_model(commands: list[str]) -> None:
    x = torch.randn(3, 8)
    files = compile_call(Call(AFTER, torch.nn.Linear(8, 8), {"input": x}), {}, embed_weights=False)
    assert any(str(file).endswith(".so") for file in files)
    assert commands
    assert not [command for command in commands if "-march" in command]
    if "AVX" in cpu_arch():
        assert all("-mavx" in command for command in commands if ".cpp" in command)


def test_a_gpus_host_code(commands: list[str]) -> None:
    """Compiled here as what it is there: C++ for any processor, and no instruction set tried out."""
    before = str(pick_vec_isa())
    commands.clear()
    model = torch.export.export(torch.nn.Linear(8, 8), (torch.randn(3, 8),)).module()
    with torch.no_grad(), portable(CUDA) as options:
        assert pick_vec_isa() is invalid_vec_isa
        library = torch._inductor.aot_compile(model, (torch.randn(3, 8),), options=options)
    assert Path(str(library)).exists()
    assert commands
    assert not [command for command in commands if "-march" in command or "-mavx" in command or "avx" in command]
    assert str(pick_vec_isa()) == before
