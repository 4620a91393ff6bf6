"""LoRA in figures: real runs of the command, and that it doesn't pass what is broken on purpose."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
from torch import nn

from benchmark import lora_inputs
from export import lora_file
from export.lora import Adapter
from recipes.weights import Weight
from utils import request
from utils.checkpoints import TINY_FOLDER

SMALL = ("--height", 64, "--width", 48, "--steps", 2, "--device", "cpu")
LINEARS_OF_BLOCKS = {"double": 12, "single": 5}
FLOAT8 = "bf16,fused_qkv=true,quantization=float8_per_row"


def command(main: Callable, recipe: str, output: Path, *more: object) -> Any:
    return main("benchmark.lora", recipe, *SMALL, "--output", output, *more)


def bytes_of_linears() -> int:
    """Of the embedded model's attention and feed-forward Linears, in its files."""
    block = re.compile(r"(single_)?transformer_blocks\.\d+\.(?!norm).*\.weight")
    files = [load_file(path) for path in (TINY_FOLDER / "transformer").glob("*.safetensors")]
    return sum(x.nbytes for file in files for name, x in file.items() if block.fullmatch(name) and x.ndim == 2)


def test_load_scale_and_removal(main: Callable, tmp_path: Path) -> None:
    output, scratch = tmp_path / "lora.json", tmp_path / "scratch"
    scratch.mkdir()
    ended = command(main, FLOAT8, output, "--scratch", scratch, "--runs", 2, "--rank", 4, "--commit", "abc123")
    assert ended.code == 0, ended.err
    assert list(scratch.iterdir()) == []
    found = json.loads(output.read_text())
    assert (found["schema"], found["checkpoint"], found["request"]["width"]) == (1, "tiny", 48)
    assert (found["recipe"]["name"], found["environment"]["commit"]) == (FLOAT8, "abc123")
    assert found["command"].startswith("python ")
    layers = 2 * LINEARS_OF_BLOCKS["double"] + 4 * LINEARS_OF_BLOCKS["single"]
    lora = found["lora"]
    assert (lora["values"], lora["rank"], lora["layers"]) == ("random", 4, layers)
    assert lora["scales"] == {"load": 1.0, "scale": 0.5}
    assert list(found["seconds"]) == ["load", "scale", "remove"]
    for seconds in found["seconds"].values():
        assert len(seconds["runs"]) == 2
        assert 0 < min(seconds["runs"]) <= seconds["median"] <= max(seconds["runs"])
    for sizes in found["bytes"].values():
        assert sizes["read"] == bytes_of_linears()
        assert 0 < sizes["at_rest"] <= sizes["peak"]
    assert found["compilations"] == {"before": 0, "meanwhile": 0}
    assert all(0 < change < 1 for change in found["latents_relative_change"].values())
    assert found["weights_restored"] > layers

    head, blank, columns, rule, *rows, _, last = ended.out.splitlines()
    assert head.startswith(f"{FLOAT8}, tiny, 64x48-b1-s2, ")
    assert f"LoRA of random values, rank 4, {layers} layers" in head
    assert (blank, columns) == ("", "| | load | change of scale | removal |")
    assert {line.count("|") for line in (columns, rule, *rows)} == {5}
    assert last.startswith("Compiled before: 0; meanwhile: 0.")


@pytest.mark.slow
@pytest.mark.parametrize("execution", ["compile", "aoti"])
def test_nothing_is_compiled_meanwhile(main: Callable, tmp_path: Path, execution: str) -> None:
    output, packages = tmp_path / "lora.json", tmp_path / "packages"
    ended = command(main, f"fp32,execution={execution}", output, "--packages", packages, "--runs", 1)
    assert ended.code == 0, ended.err
    found = json.loads(output.read_text())
    assert found["compilations"]["before"] > 0
    assert found["compilations"]["meanwhile"] == 0
    assert bool(list(packages.glob("*.pt2"))) == (execution == "aoti")


@pytest.mark.gpu
@pytest.mark.slow
def test_under_a_cuda_graph(main: Callable, tmp_path: Path) -> None:
    output = tmp_path / "lora.json"
    ended = command(main, f"{FLOAT8},execution=aoti,cuda_graph=true", output, "--device", "cuda")
    assert ended.code == 0, ended.err
    found = json.loads(output.read_text())
    assert found["compilations"]["before"] > 0
    assert found["compilations"]["meanwhile"] == 0
    assert all(0 < sizes["at_rest"] <= sizes["peak"] for sizes in found["bytes"].values())


def test_random_weights_are_written_and_read_again(main: Callable, small_random: None, tmp_path: Path) -> None:
    output, scratch = tmp_path / "lora.json", tmp_path / "scratch"
    scratch.mkdir()
    asked = ("--checkpoint", "random/flux-dev", "--scratch", scratch, "--runs", 1)
    ended = command(main, FLOAT8, output, *asked)
    assert ended.code == 0, ended.err
    assert list(scratch.iterdir()) == []
    assert f"writing the weights of random/flux-dev to {scratch}" in ended.err
    found = json.loads(output.read_text())
    assert (found["checkpoint"], found["lora"]["layers"]) == ("random/flux-dev", sum(LINEARS_OF_BLOCKS.values()))
    # In both blocks 8 and 3 projections of 256 x 256, and MLPs of four times the width: 2 x 8 and 4 + 5 times as much.
    assert {sizes["read"] for sizes in found["bytes"].values()} == {2 * 256 * 256 * (8 + 3 + 16 + 9)}


def test_the_lora(tiny: Callable[..., DiffusionPipeline], tmp_path: Path) -> None:
    """All attention and feed-forward Linears, each changed by a fiftieth of its norm; the same file every time."""
    transformer = tiny().transformer
    file = lora_inputs.write_lora(transformer, 8, tmp_path / "one")
    assert file.read_bytes() == lora_inputs.write_lora(transformer, 8, tmp_path / "two").read_bytes()
    lora = lora_file.read(file)
    for name, factors in lora.layers.items():
        weight = transformer.get_submodule(name).weight.detach()
        assert factors.shape == list(weight.shape)
        assert factors.down.shape[0] == 8
        change = factors.added_to(torch.zeros_like(weight), 1.0).norm() / weight.norm()
        assert 0.015 < float(change) < 0.025, name
    inside = {n for n, m in transformer.named_modules() if isinstance(m, nn.Linear) and "transformer_blocks." in n}
    assert inside - lora.layers.keys() == {name for name in inside if ".norm" in name}


def compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Adapter.scale

    def scale(self: Adapter, scale: float) -> None:
        real(self, scale)
        torch.compile(lambda x: x + scale, backend="eager")(torch.ones(2))

    monkeypatch.setattr(Adapter, "scale", scale)


def leaves_a_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Adapter, "remove", lambda self: self.scale(0.1))


def leaves_a_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a weight that no LoRA touches, and too small to show in the latents."""
    real = Adapter.remove

    def remove(self: Adapter) -> None:
        real(self)
        self._pipe.transformer.norm_out.linear.bias.data.view(torch.uint8)[0] ^= 1

    monkeypatch.setattr(Adapter, "remove", remove)


def leaves_a_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Adapter.remove

    def remove(self: Adapter) -> None:
        real(self)
        self._pipe.transformer.register_buffer("left", torch.ones(1))

    monkeypatch.setattr(Adapter, "remove", remove)


def overflows(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Adapter.scale
    monkeypatch.setattr(Adapter, "scale", lambda self, scale: real(self, 1e38))


def draws_as_it_likes(monkeypatch: pytest.MonkeyPatch) -> None:
    real = request.noise
    monkeypatch.setattr(request, "noise", lambda *arguments: torch.randn_like(real(*arguments)))


def moves_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def write(self: Weight, plain: torch.Tensor) -> None:
        self.module.weight = nn.Parameter(plain.clone(), requires_grad=False)

    monkeypatch.setattr(Weight, "write", write)


def does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Weight, "write", lambda self, plain: None)


def ignores_the_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Adapter, "scale", lambda self, scale: None)


def leaves_the_latents_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Adapter.remove

    def remove(self: Adapter) -> None:
        real(self)
        self._pipe.scheduler.register_to_config(shift=0.5)
        self._pipe.scheduler.set_shift(0.5)

    monkeypatch.setattr(Adapter, "remove", remove)


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        (compiles, r"\d+ graphs were compiled while the LoRA came and went"),
        (leaves_a_trace, r"transformer_blocks.* is not, bit for bit, as before the LoRA \(44 of \d+ weights\)"),
        (leaves_a_bit, r"after the removal norm_out\.linear\.bias is not, bit for bit, as .* \(1 of \d+ weights\)"),
        (draws_as_it_likes, "without a LoRA, two calls with the same arguments end in different latents already"),
        (leaves_a_buffer, "after the removal there are other weights: left"),
        (overflows, "with the LoRA at scale 0.5 the latents aren't finite"),
        (moves_weights, r"after the removal .*transformer_blocks.* lies elsewhere than before the LoRA"),
        (does_nothing, "the LoRA at scale 1 has no effect"),
        (ignores_the_scale, "the LoRA at scale 0.5 has no effect"),
        (leaves_the_latents_changed, "after the removal the latents differ .* though no weight does"),
    ],
)
def test_what_is_broken_is_no_result(
    main: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, broken: Callable, words: str
) -> None:
    broken(monkeypatch)
    ended = command(main, "fp32", tmp_path / "lora.json", "--runs", 1)
    assert ended.code == 1
    assert re.search(words, ended.error())
    assert list(tmp_path.iterdir()) == []
    assert ended.out == ""


def test_a_disk_that_is_too_small(main: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Told before any weight is made: 11.9 B of them in bfloat16 and 1 GB beside."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=24 * 10**9))
    ended = command(main, "bf16", tmp_path / "lora.json", "--checkpoint", "random/flux-dev", "--scratch", tmp_path)
    assert ended.code == 1
    assert "24.8 GB are needed and 24.0 GB free; name a folder on a larger disk with --scratch" in ended.error()
    assert list(tmp_path.iterdir()) == []


def test_no_time_for_further_runs(main: Callable, tmp_path: Path) -> None:
    output = tmp_path / "lora.json"
    ended = command(main, "fp32", output, "--seconds", 0)
    assert ended.code == 0
    assert "no time left of 0 s: 1 runs instead of 3" in ended.lines
    assert len(json.loads(output.read_text())["seconds"]["load"]["runs"]) == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--runs", 0), "--runs 0: give at least 1"),
        (("--rank", 0), "--rank 0: give at least 1"),
        (("--steps", 0), "--steps 0: give at least 1"),
        (("--checkpoint", "random/flux-kontext-dev"), "edits an image"),
        (("--checkpoint", "random/flux"), "unknown checkpoint 'random/flux'"),
        (("--output", "no/such/folder.json"), "the folder no/such does not exist"),
        (("--scratch", "no/such"), "the folder no/such does not exist"),
    ],
)
def test_bad_usage(main: Callable, tmp_path: Path, arguments: tuple, words: str) -> None:
    ended = command(main, "fp32", tmp_path / "lora.json", *arguments)
    assert ended.code == 2
    assert words in ended.error()
    assert list(tmp_path.iterdir()) == []
