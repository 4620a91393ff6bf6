"""What tests share: the embedded model, small calls of it, and the two scripts run in this process or a fresh one."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from transformers import CLIPTextConfig, T5Config

from recipes import flash_attention_3
from utils import checkpoints, random_weights
from utils.files import ROOT
from utils.relative_error import relative_error

CPU = torch.device("cpu")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def tiny() -> Callable[..., DiffusionPipeline]:
    """tiny(dtype=torch.float32, device=CPU): the embedded model, loaded anew."""

    def load(dtype: torch.dtype = torch.float32, device: torch.device = CPU) -> DiffusionPipeline:
        pipe = checkpoints.load("tiny", dtype, device, progress=False)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return load


@pytest.fixture(scope="session")
def draw() -> Callable[..., np.ndarray]:
    """draw(pipe, ...): images [batch, height, width, 3] in 0..1 of one small call."""

    def call(
        pipe: DiffusionPipeline,
        prompt: str = "a red circle",
        seed: int = 0,
        steps: int = 1,
        batch: int = 1,
        **more: Any,
    ) -> np.ndarray:
        generators = [torch.Generator().manual_seed(seed + i) for i in range(batch)]
        size = {"height": 64, "width": 64, "num_inference_steps": steps, "num_images_per_prompt": batch}
        options = {"guidance_scale": 0.0, "max_sequence_length": 64, "generator": generators, "output_type": "np"}
        return pipe(prompt=prompt, **{**size, **options, **more}).images

    return call


@pytest.fixture(scope="session")
def predict() -> Callable[..., torch.Tensor]:
    """predict(pipe, batch, side, seed, text_tokens): one call of the transformer on random inputs of that seed; [batch,
    side * side tokens, 64] float32."""

    def call(
        pipe: DiffusionPipeline, batch: int = 1, side: int = 4, seed: int = 0, text_tokens: int = 8
    ) -> torch.Tensor:
        random = torch.Generator().manual_seed(seed)
        transformer = pipe.transformer

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=random).to(transformer.device, transformer.dtype)

        ids = torch.zeros(side * side, 3, device=transformer.device)
        ids[:, 1], ids[:, 2] = torch.arange(side * side) // side, torch.arange(side * side) % side
        with torch.no_grad():
            return transformer(
                hidden_states=normal(batch, side * side, transformer.config.in_channels),
                encoder_hidden_states=normal(batch, text_tokens, transformer.config.joint_attention_dim),
                pooled_projections=normal(batch, transformer.config.pooled_projection_dim),
                timestep=torch.full((batch,), 0.5, dtype=transformer.dtype, device=transformer.device),
                img_ids=ids,
                txt_ids=torch.zeros(text_tokens, 3, device=transformer.device),
                return_dict=False,
            )[0].float()

    return call


@contextmanager
def _waiting_is_an_error() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.fixture(scope="session")
def waiting_is_an_error() -> Callable[[], AbstractContextManager]:
    """with waiting_is_an_error(): PyTorch raises where the host would wait for the GPU."""
    return _waiting_is_an_error


@pytest.fixture
def pretend_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """pretend_gpu((8, 0), name, without): from here on recipes are told of such a GPU, with every package and kernel
    there but the packages `without`.

    Of packages that no recipe asks for (peft looks for bitsandbytes, and remembers) they are told the truth.
    """
    needed = {"triton", "torchao", "cudnn", "cuda", "cuda.bindings", "kernels", "flash_attn_interface"}
    find_spec = importlib.util.find_spec

    def tell(capability: tuple[int, int], name: str = "a GPU", without: tuple[str, ...] = ()) -> None:
        def found(package: str, *parent: str) -> object:
            if package in needed:
                return None if package in without else object()
            return find_spec(package, *parent)

        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
        monkeypatch.setattr(importlib.util, "find_spec", found)
        monkeypatch.setattr(flash_attention_3, "_flash_attn_func", lambda: None)
        flash_attention_3.loading_error.cache_clear()

    yield tell
    flash_attention_3.loading_error.cache_clear()


@pytest.fixture(scope="session")
def error_of() -> Callable[[torch.Tensor, torch.Tensor], float]:
    """error_of(value, reference): ||value - reference|| / ||reference||."""
    return relative_error


@pytest.fixture
def tiny_copy(tmp_path: Path) -> Path:
    """A copy of the embedded model in a folder of its own, to damage."""
    return Path(shutil.copytree(checkpoints.TINY_FOLDER, tmp_path / "copy"))


@pytest.fixture
def kontext(tiny_copy: Path) -> Path:
    """A copy of the embedded model that calls itself a FluxKontextPipeline."""
    index = json.loads((tiny_copy / "model_index.json").read_text())
    index["_class_name"] = "FluxKontextPipeline"
    (tiny_copy / "model_index.json").write_text(json.dumps(index))
    return tiny_copy


@pytest.fixture
def small_random(monkeypatch: pytest.MonkeyPatch) -> None:
    """random/flux-... with one block of each kind, and small in all else."""
    transformer, vae = random_weights.FluxTransformer2DModel, random_weights.AutoencoderKL
    small = {"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 2, "joint_attention_dim": 32}
    clip = CLIPTextConfig(hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    t5 = T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=2, is_encoder_decoder=False, use_cache=False)
    replaced: dict[str, Callable] = {
        "FluxTransformer2DModel": lambda **known: transformer(**known, **small, pooled_projection_dim=64),
        "AutoencoderKL": lambda **known: vae(**{**known, "block_out_channels": (32,) * 4}),
        "_clip_l": lambda tokenizer: clip,
        "_t5_xxl": lambda: t5,
    }
    for name, value in replaced.items():
        monkeypatch.setattr(random_weights, name, value)


@dataclass(frozen=True)
class Ended:
    """How a command ended. `lines`: of stderr, progress bars split up as a terminal shows them."""

    code: int
    out: str
    err: str

    @property
    def lines(self) -> list[str]:
        return [line.strip() for line in re.split(r"[\r\n]+", self.err) if line.strip()]

    def error(self) -> str:
        """The one line that says what went wrong, after checking that it is one and the last, and no traceback."""
        assert "Traceback" not in self.err, self.err
        errors = [line for line in self.lines if line.startswith("error: ")]
        assert len(errors) == 1, self.err
        assert self.lines[-1] == errors[0], self.err
        return errors[0]


@pytest.fixture
def main(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., Ended]:
    """main("gen_image", *arguments): a script's own main, in this process."""

    def call(script: str, *arguments: object) -> Ended:
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *map(str, arguments)])
        capfd.readouterr()
        code = 0
        try:
            importlib.import_module(script).main()
        except SystemExit as ended:
            code = ended.code or 0
        return Ended(code, *capfd.readouterr())

    return call


@pytest.fixture(scope="session")
def script() -> Callable[..., Ended]:
    """script("gen_image.py", *arguments): the script in a fresh process, from a working directory of its own."""

    def call(name: str, *arguments: object, cwd: Path = ROOT, **environment: str) -> Ended:
        command = [sys.executable, str(ROOT / name), *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env={**os.environ, **environment})
        return Ended(done.returncode, done.stdout, done.stderr)

    return call


@pytest.fixture
def shared() -> Iterator[Path]:
    """A folder where everybody may write, in one that everybody may enter, which pytest's isn't."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o1777)
        yield Path(folder)
