"""Attention as a custom op in a package: exported whole, called by the package's code, named in its identity."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from export import runtime
from export.manifest import identify
from export.runtime import library_of
from export.store import PackageStore
from export.verify import verify
from recipes import Recipe, attention, compile, vae_attention
from recipes.attention_processor import Processor
from tests.recipes import cudnn_in_pytorch
from utils import environment

CPU = torch.device("cpu")


@pytest.mark.parametrize("backend", ["native", "cudnn", "triton_fp8", "cudnn_fp8"])
def test_the_frontend_is_part_of_what_uses_it(tiny: Callable, monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    """PyTorch's own cuDNN attention comes with torch, and Triton's version counts on every GPU."""
    monkeypatch.setattr(environment, "version", lambda package: f"{package} 1")
    here = identify(tiny(), Recipe(execution="aoti", attention=backend))
    assert here.cudnn_frontend == ("nvidia-cudnn-frontend 1" if backend == "cudnn_fp8" else None)
    other = replace(here, cudnn_frontend="nvidia-cudnn-frontend 2")
    assert other.refusal(here, "transformer") == (
        "was built for cudnn_frontend nvidia-cudnn-frontend 2, this is "
        f"{'nvidia-cudnn-frontend 1' if backend == 'cudnn_fp8' else 'null'}"
    )


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [(16,), (16, 40)], ids=["fixed", "dynamic"])
def test_cudnn_fp8_in_a_package(tiny: Callable, tmp_path: Path, tokens: tuple[int, ...]) -> None:
    """Built and run for a CPU, with PyTorch's own computation under the op's name: a package holds the call alone."""
    pipe, recipe = tiny(torch.bfloat16), Recipe(dtype="bfloat16", execution="aoti", attention="cudnn_fp8")
    attention.OPTIMIZATION.apply(pipe, recipe)
    block = pipe.transformer.single_transformer_blocks[0]
    assert isinstance(block.attn.processor, Processor)
    runtime.attach(pipe, recipe, compile.inductor_options(recipe, CPU), PackageStore(tmp_path))
    library = library_of(pipe)
    single = next(region for region in library.packaged if region.module is block)
    random = torch.Generator().manual_seed(0)

    def arguments(image_tokens: int) -> dict[str, Any]:
        inputs: dict[str, Any] = {
            name: torch.randn(size, generator=random).bfloat16()
            for name, size in {
                "hidden_states": (1, image_tokens, 256),
                "encoder_hidden_states": (1, 8, 256),
                "temb": (1, 256),
            }.items()
        }
        rotary = tuple(torch.randn(8 + image_tokens, 128, generator=random) for _ in range(2))
        return single.region.arguments((), {**inputs, "image_rotary_emb": rotary})

    calls = []

    def on_a_cpu(*tensors: torch.Tensor) -> torch.Tensor:
        calls.append([x.dtype for x in tensors])
        return cudnn_in_pytorch.cudnn_attention_float8(*tensors)

    with torch.library._scoped_library("flux_fast", "IMPL") as implementation:
        implementation.impl("cudnn_attention_float8", on_a_cpu, "CPU")
        inputs = [(single, arguments(image_tokens)) for image_tokens in tokens]
        entry, _ = library.build(inputs, dynamic=len(tokens) > 1)
        calls.clear()
        (error,) = verify(entry, library)
    assert error.ok, error
    assert error.modules == len(pipe.transformer.single_transformer_blocks)
    assert calls == [[torch.float8_e4m3fn] * 3 + [torch.float32]] * (
        2 * error.modules * (1 if len(tokens) == 1 else 3)
    ), "once eager, once packaged; of a range three sizes"


@pytest.mark.slow
def test_the_vaes_attention_in_a_package(tiny: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For a CPU, where its op is there too; in four parts."""
    pipe, recipe = tiny(torch.bfloat16), Recipe(dtype="bfloat16", execution="aoti", vae_attention="gemm")
    vae_attention.OPTIMIZATION.apply(pipe, recipe)
    monkeypatch.setattr(vae_attention, "_SCORES", 64 * 16)
    runtime.attach(pipe, recipe, compile.inductor_options(recipe, CPU), PackageStore(tmp_path))
    library = library_of(pipe)
    decoder = next(region for region in library.packaged if region.module is pipe.vae.decoder)
    sample = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    entry, _ = library.build([(decoder, decoder.region.arguments((), {"sample": sample}))])
    calls = []

    def counted(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        calls.append((tuple(a.shape), tuple(b.shape)))
        return a.float() @ b.float()

    with torch.library._scoped_library("flux_fast", "IMPL") as implementation:
        implementation.impl("mm_float32", counted, "CPU")
        (error,) = verify(entry, library)
    assert error.ok, error
    channels = pipe.vae.decoder.mid_block.attentions[0].to_q.in_features
    assert calls == [((16, channels), (channels, 64))] * 4 * 2, "eager and packaged"
