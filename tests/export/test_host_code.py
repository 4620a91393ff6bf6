"""What the compiler may use of this processor: no more than a package's identity names. And that it gets right C++."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from pathlib import Path

import pytest
import torch
from torch._inductor import cpp_builder
from torch._inductor.cpu_vec_isa import invalid_vec_isa, pick_vec_isa

from export.build import Call, compile_call
from export.host_code import portable, told_apart
from export.manifest import cpu_arch
from export.regions import AFTER

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


@pytest.mark.slow
def test_a_cpus_model(commands: list[str]) -> None:
    x = torch.randn(3, 8)
    files = compile_call(Call(AFTER, torch.nn.Linear(8, 8), {"input": x}), {}, embed_weights=False)
    assert any(str(file).endswith(".so") for file in files)
    assert commands
    assert not [command for command in commands if "-march" in command]
    if "AVX" in cpu_arch():
        assert all("-mavx" in command for command in commands if ".cpp" in command)


@pytest.mark.slow
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


class Lines(list[str]):
    def writeline(self, line: str) -> None:
        self.append(line)


class Generator:
    """Declares arrays as PyTorch 2.11 does: by the id of a bound method, of which the next one may have the same."""

    def __init__(self) -> None:
        self.cache: dict[tuple[str, int], str] = {}
        self.number = count()

    def declare(self, int_array: str, writeline: Callable[[str], None]) -> str:
        key = int_array, id(writeline)
        if key not in self.cache:
            self.cache[key] = f"int_array_{next(self.number)}"
            writeline(f"{self.cache[key]} = {int_array}")
        return self.cache[key]


def test_an_array_is_declared_once_wherever_it_is_used() -> None:
    generator, first, second = Generator(), Lines(), Lines()
    declare = told_apart(Generator.declare)
    used = [declare(generator, "{1, 2}", place.writeline) for place in (first, second, first, second)]
    assert used[:2] == used[2:]
    assert (first, second) == ([f"{used[0]} = {{1, 2}}"], [f"{used[1]} = {{1, 2}}"])
