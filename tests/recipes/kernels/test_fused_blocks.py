"""The blocks on fused kernels against diffusers' own, on the embedded model: eagerly, and on a GPU compiled too."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from diffusers import DiffusionPipeline

pytest.importorskip("triton", reason="needs the package triton, which isn't installed")

import recipes
from recipes import Recipe, attention, cudnn_attention, float8, fused_kernels, fused_qkv
from recipes.kernels.attention import CONFIGS, _attention_kernel
from recipes.quantized_linear import QuantizedLinear
from tests.recipes import cudnn_in_pytorch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = [] if INTERPRETED else [pytest.mark.gpu]
FUSED = Recipe(dtype="bfloat16", fused_qkv=True, fused_kernels=True)


@pytest.fixture
def apply(monkeypatch: pytest.MonkeyPatch) -> Callable[[DiffusionPipeline, Recipe], None]:
    """recipes.apply; in the interpreter past its refusal of a CPU, in apply's order."""
    if not INTERPRETED:
        return recipes.apply
    monkeypatch.setattr(CONFIGS[0], "kwargs", {"QUERIES": 32, "KEYS": 32, "LATE": True})
    monkeypatch.setattr(_attention_kernel, "configs", CONFIGS[:1])
    monkeypatch.setattr(cudnn_attention, "cudnn_attention_float8", cudnn_in_pytorch.cudnn_attention_float8)

    def call(pipe: DiffusionPipeline, recipe: Recipe) -> None:
        for optimization in (attention, fused_qkv, float8, fused_kernels):
            if optimization.OPTIMIZATION.requested(recipe):
                optimization.OPTIMIZATION.apply(pipe, recipe)

    return call


def skip_unless_it_runs(recipe: Recipe) -> None:
    if INTERPRETED and recipe.attention == "wgmma_fp8":
        pytest.skip("CUDA C++ needs a GPU")
    refusal = None if INTERPRETED else recipes.refusal(recipe, torch.device("cuda"))
    if refusal is not None:
        pytest.skip(refusal)


@pytest.fixture
def load(tiny: Callable, device: torch.device) -> Callable[..., DiffusionPipeline]:
    return lambda dtype=torch.bfloat16: tiny(dtype).to(device)


@pytest.fixture
def error(predict: Callable, load: Callable, error_of: Callable) -> Callable[..., float]:
    """error(pipe, batch): of one call of its transformer, against diffusers' in float32."""

    def call(pipe: DiffusionPipeline, batch: int = 2) -> float:
        return error_of(predict(pipe, batch), predict(load(torch.float32), batch))

    return call


def test_bfloat16_is_as_exact_as_unfused(load: Callable, apply: Callable, error: Callable) -> None:
    plain, fused = load(), load()
    apply(plain, replace(FUSED, fused_kernels=False))
    apply(fused, FUSED)
    assert 0 < error(fused) <= 1.1 * error(plain)


@pytest.mark.parametrize("backend", ["native", "triton_fp8", "cudnn_fp8", "wgmma_fp8"])
def test_float8_is_as_exact_as_unfused(load: Callable, apply: Callable, error: Callable, backend: str) -> None:
    plain, fused = load(), load()
    recipe = replace(FUSED, quantization="float8_per_row", attention=backend)
    skip_unless_it_runs(recipe)
    apply(plain, replace(recipe, fused_kernels=False))
    apply(fused, recipe)
    assert 1e-3 < error(fused) <= 1.2 * error(plain)
    linears = [name for name, module in fused.transformer.named_modules() if isinstance(module, QuantizedLinear)]
    assert len(linears) == 2 * 8 + 4 * 2, "every Linear of the blocks but the modulation's"


@pytest.mark.skipif(INTERPRETED, reason="CUDA C++ needs a GPU")
@pytest.mark.parametrize("execution", ["eager", "compile"])
@pytest.mark.parametrize("batch", [1, 2])
def test_gemm_epilogues(
    load: Callable, predict: Callable, error: Callable, error_of: Callable, execution: str, batch: int
) -> None:
    """As exact as the kernels apart, in int8 more so, and compiled without a break."""
    plain, fused, in_int8 = load(), load(), load()
    recipe = replace(FUSED, quantization="float8_per_row", attention="wgmma_fp8", execution=execution)
    skip_unless_it_runs(recipe)
    recipes.apply(plain, recipe)
    recipes.apply(fused, replace(recipe, gemm_epilogues=True))
    recipes.apply(in_int8, replace(recipe, gemm_epilogues=True, int8_adaln=True))
    assert 1e-3 < error(fused, batch) <= 1.1 * error(plain, batch)
    assert error_of(predict(fused, batch), predict(plain, batch)) < 0.06
    assert 1e-3 < error(in_int8, batch) < error(fused, batch)


def test_float8_weights_are_not_copied(load: Callable, apply: Callable) -> None:
    pipe, recipe = load(), replace(FUSED, quantization="float8_per_row")
    apply(pipe, replace(recipe, fused_kernels=False))
    weight = pipe.transformer.transformer_blocks[0].ff.net[2].weight
    fused_kernels.OPTIMIZATION.apply(pipe, recipe)
    linear = pipe.transformer.transformer_blocks[0].ff.net[2]
    assert linear.weight.data_ptr() == weight.qdata.data_ptr()
    assert linear.weight_scale.data_ptr() == weight.scale.data_ptr()


@pytest.mark.parametrize("quantization", ["none", "float8_per_row"])
def test_parameters_are_as_many_as_before(load: Callable, apply: Callable, quantization: str) -> None:
    plain, fused = load(), load()
    apply(plain, Recipe(dtype="bfloat16", fused_qkv=True))
    apply(fused, replace(FUSED, quantization=quantization))
    before, after = ({n: p.numel() for n, p in x.transformer.named_parameters()} for x in (plain, fused))
    scales = sum(size for name, size in after.items() if name.endswith("weight_scale"))
    assert sum(after.values()) - scales == sum(before.values())
    assert (scales > 0) == (quantization != "none")


def test_attention_alone_in_float8(load: Callable, apply: Callable, error: Callable) -> None:
    fused = load()
    apply(fused, replace(FUSED, attention="triton_fp8"))
    assert 1e-3 < error(fused) < 0.05


def test_other_arguments_are_refused(load: Callable, apply: Callable) -> None:
    pipe = load()
    apply(pipe, FUSED)
    block = pipe.transformer.single_transformer_blocks[0]
    with pytest.raises(NotImplementedError, match="fused kernels take no ip_hidden_states"):
        block(None, None, None, None, {"ip_hidden_states": []})


@pytest.mark.skipif(INTERPRETED, reason="compiling needs a GPU")
@pytest.mark.parametrize("backend", ["native", "cudnn", "triton_fp8", "cudnn_fp8", "wgmma_fp8"])
@pytest.mark.parametrize("quantization", ["none", "float8_per_row"])
def test_compiles_without_a_break(
    load: Callable, predict: Callable, error_of: Callable, backend: str, quantization: str
) -> None:
    eager, compiled = load(), load()
    recipe = replace(FUSED, quantization=quantization, attention=backend)
    skip_unless_it_runs(recipe)
    recipes.apply(eager, recipe)
    recipes.apply(compiled, replace(recipe, execution="compile"))  # fullgraph: a break is an error
    torch._dynamo.utils.counters.clear()
    first = predict(compiled, 2)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs <= 4, "one for each kind of block, the first of each kind apart"
    assert error_of(first, predict(eager, 2)) < 0.03
    predict(compiled, 2)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs, "no recompilation"
