"""What goes into a result beside times: image differences, the machine, compile seconds, and the file itself."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch._dynamo.utils import dynamo_timed

from utils import environment, results
from utils.compile_clock import CompileClock, compilation
from utils.errors import UserError
from utils.image_metrics import difference

CPU = torch.device("cpu")
GRAY = Image.new("RGB", (32, 32), (128, 128, 128))


def test_equal_images() -> None:
    assert difference(GRAY, GRAY.copy()) == {"max_abs": 0, "psnr_db": None, "ssim": 1.0}


def test_difference_of_known_images() -> None:
    brighter = Image.new("RGB", (32, 32), (138, 128, 128))  # mean squared error 100 / 3
    found = difference(brighter, GRAY)
    assert found["max_abs"] == 10
    assert found["psnr_db"] == round(10 * np.log10(255**2 / (100 / 3)), 2)
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    assert difference(noise, GRAY)["ssim"] < 0.1
    assert difference(Image.new("RGB", (32, 32), "white"), Image.new("RGB", (32, 32)))["max_abs"] == 255


H100 = {"device_type": "cuda", "device": "NVIDIA H100 80GB HBM3", "power_limit_w": 700.0, "torch": "2.11.0+cu130"}


@pytest.mark.parametrize(
    ("machine", "slug"),
    [
        (H100, "h100-sxm-700w-torch2.11"),
        ({**H100, "power_limit_w": 450.5}, "h100-sxm-450w-torch2.11"),
        ({**H100, "power_limit_w": None}, "h100-sxm-torch2.11"),
        ({**H100, "device": "NVIDIA H200", "torch": "2.13.0"}, "h200-700w-torch2.13"),
        ({"device_type": "cpu", "device": "Some (AVX2)", "cores": 2, "torch": "2.13.0+cpu", "power_limit_w": None},
         "cpu-2c-torch2.13"),
    ],
)  # fmt: skip
def test_machine_slug(machine: dict, slug: str) -> None:
    assert environment.machine_slug(machine) == slug


def test_environment_of_this_machine() -> None:
    found = environment.capture(CPU)
    version = ".".join(torch.__version__.split(".")[:2])
    assert environment.machine_slug(found) == f"cpu-{found['cores']}c-torch{version}"
    assert found["torch"].startswith(torch.__version__.split("+")[0])
    for key in ("device", "power_limit_w", "driver", "cuda", "cudnn", "triton", "diffusers", "transformers", "torchao"):
        assert key in found
    assert {"python", "os", "commit", "clean"} <= set(found)
    json.dumps(found)


def test_commit_from_the_option_where_no_git_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    found = environment.capture(CPU, commit="abc123")
    assert (found["commit"], found["clean"]) == ("abc123", None)


def test_clock_counts_an_ahead_of_time_build_and_nested_ones_once() -> None:
    with CompileClock() as clock:
        with compilation("one"), compilation("within"):
            pass
        assert clock.compilations == 1
        with pytest.raises(RuntimeError), compilation("broken"):
            raise RuntimeError
    assert clock.compilations == 2
    assert clock.seconds > 0
    with compilation("afterwards"):
        pass
    assert clock.compilations == 2


def test_clock_says_which_build_is_under_way_and_what_each_took(capfd: pytest.CaptureFixture[str]) -> None:
    with CompileClock(progress=True) as clock:
        for number, seconds in enumerate((0.1, 0.3), 1):
            with compilation(f"block ({number} of 2)"):
                time.sleep(seconds)
        torch.compile(lambda x: 3 * x, backend="eager", dynamic=False)(torch.ones(3))
    assert clock.compilations == 3
    assert clock.named == {"block (1 of 2)": pytest.approx(0.1, abs=0.1), "block (2 of 2)": pytest.approx(0.3, abs=0.1)}
    shown = [line.strip() for line in re.split(r"[\r\n]+", capfd.readouterr().err) if line.strip()]
    for line in ("compiling block (1 of 2): 0 graphs done", "compiling block (2 of 2): 1 graphs done"):
        assert any(one.startswith(line) for one in shown), shown
    assert shown[-1].startswith("compiling: 3 graphs done"), "Dynamo's own are numbers, which say nothing"


def test_clock_counts_torch_compile() -> None:
    @torch.compile(backend="eager", dynamic=False)
    def double(x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    with CompileClock() as clock:
        double(torch.ones(3))
        double(torch.zeros(3))
    assert clock.compilations == 1
    assert clock.seconds > 0
    with CompileClock() as clock:
        double(torch.ones(3))
    assert (clock.compilations, clock.seconds, clock.phases) == (0, 0, {})


def test_clock_counts_autotuning_at_the_first_launch_once() -> None:
    """PyTorch's own record of it, inside a compilation and after it."""
    with CompileClock() as clock:
        with compilation("kernel"), dynamo_timed("CachingAutotuner.benchmark_all_configs"):
            time.sleep(0.2)
        inside = clock.seconds
        with dynamo_timed("CachingAutotuner.benchmark_all_configs"):
            time.sleep(0.3)
        with dynamo_timed("something else"):
            time.sleep(0.2)
        with compilation("next"):
            pass
    assert 0.2 <= inside < 0.3
    assert 0.5 <= clock.seconds < 0.6
    assert clock.compilations == 2
    assert clock.phases["CachingAutotuner.benchmark_all_configs"] == pytest.approx(0.5, abs=0.1)


RESULT = {
    "recipe": {"name": "bf16"},
    "checkpoint": "tiny",
    "request": {},
    "environment": {},
    "command": "python run_benchmark.py",
    "skipped": "not here",
}


def test_results_are_read_back(tmp_path: Path) -> None:
    path = tmp_path / "machine" / "tiny" / "bf16@64x64-b1-s1.json"
    results.write(path, RESULT)
    assert results.read(path) == {"schema": 1, **RESULT}
    assert results.files(path.parent) == [path]


def test_a_write_that_fails_leaves_the_old_result(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    results.write(path, RESULT)
    with pytest.raises(TypeError):
        results.write(path, {**RESULT, "request": {"generator": torch.Generator()}})
    assert results.read(path)["request"] == {}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_leftovers_of_a_killed_run_and_other_files_are_no_results(tmp_path: Path) -> None:
    (tmp_path / "diff.json").write_text('{"schema": 2}')
    (tmp_path / ".bf16@64x64-b1-s1-abcdef.json").write_text('{"schema": 1, ')
    results.write(tmp_path / "bf16@64x64-b1-s1.json", RESULT)
    assert [path.name for path in results.files(tmp_path)] == ["bf16@64x64-b1-s1.json"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"schema": 1, "recipe"', "can't be read as a result"),
        ("", "can't be read as a result"),
        ("[1]", "is not a result of schema 1"),
        ('{"schema": 2}', "is not a result of schema 1"),
        ('{"recipe": {}}', "is not a result of schema 1"),
        ('{"schema": 1}', "lacks recipe, checkpoint, request, environment, command"),
        (json.dumps({"schema": 1, **{k: v for k, v in RESULT.items() if k != "skipped"}}), "lacks applied, latency_s"),
    ],
)
def test_damaged_results_are_refused(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(UserError, match=words):
        results.read(path)


def test_folder_and_file_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for checkpoint, name in {
        "tiny": "tiny",
        "random/flux-dev": "random-flux-dev",
        "black-forest-labs/FLUX.1-schnell": "flux.1-schnell",
    }.items():
        assert results.folder(tmp_path, H100, checkpoint) == tmp_path / "h100-sxm-700w-torch2.11" / name
    (tmp_path / "My Model").mkdir()
    monkeypatch.chdir(tmp_path / "My Model")
    assert results.folder(tmp_path, H100, ".").name == "my model"
    request = {"height": 64, "width": 128, "batch": 2, "steps": 4}
    assert results.file_name("bf16", request) == "bf16@64x128-b2-s4.json"
    with_json = 'bf16,cache={"speed_factor":2.0},inductor_flags={}'
    assert results.file_name(with_json, request) == "bf16,cache=speed_factor=2.0,inductor_flags=@64x128-b2-s4.json"
    assert not set('/:"') & set(results.file_name('a/b,cache={"threshold":0.1}', request)), "no system takes them all"
