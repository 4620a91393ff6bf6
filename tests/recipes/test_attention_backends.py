"""Every attention backend against attention in float32; those that need a GPU only there."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import recipes
from recipes import Recipe, attention, float8_heads
from recipes.attention_backends import FLOAT8, backend
from recipes.cudnn_attention import cudnn_attention_float8, cudnn_fp8
from tests.recipes import cudnn_in_pytorch

NAMES = ["native", "cudnn", "fa3", "fa3_fp8", "cudnn_fp8", "triton_fp8", "wgmma_fp8"]
# Rounding query, key, value and probabilities to 3 bits of mantissa, on inputs like those of the model.
LARGEST_ERROR = {name: 0.06 if name in FLOAT8 else 0.005 for name in NAMES}


def runs_here(name: str, device: torch.device) -> None:
    refusal = attention.OPTIMIZATION.refusal(Recipe(attention=name), device)
    if refusal is not None:
        pytest.skip(refusal)


def inputs(device: torch.device, batch: int = 2, tokens: int = 333, heads: int = 3) -> tuple[torch.Tensor, ...]:
    """Query and key after RMSNorm, and values, each head's of another size; [batch, tokens, heads, 128] bfloat16."""
    random = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(batch, tokens, heads, 128, generator=random) for _ in range(3))
    q, k = (torch.nn.functional.rms_norm(x, (128,)) for x in (q, k))
    v *= 1 + torch.arange(heads)[:, None]
    return tuple(x.to(device, torch.bfloat16) for x in (q, k, v))


def reference(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    q, k, v = (x.float().transpose(1, 2) for x in (query, key, value))
    return ((q @ k.transpose(2, 3) * q.shape[-1] ** -0.5).softmax(-1) @ v).transpose(1, 2)


def assert_close(name: str, out: torch.Tensor, expected: torch.Tensor, error_of: Callable) -> None:
    assert out.dtype == torch.bfloat16
    assert out.shape == expected.shape
    for image in range(len(out)):
        assert error_of(out[image].float(), expected[image]) < LARGEST_ERROR[name]


def test_native_on_a_cpu(error_of: Callable) -> None:
    given = inputs(torch.device("cpu"))
    assert_close("native", backend("native").attend(*given), reference(*given), error_of)


@pytest.mark.parametrize("name", NAMES[1:])
def test_refused_without_a_gpu(name: str) -> None:
    recipe, cpu = Recipe(attention=name), torch.device("cpu")
    assert recipes.refusal(recipe, cpu) == f"attention={name} needs a cuda device, this is cpu"
    assert recipes.nearest(recipe, cpu) == Recipe()


def test_lossless_are_those_in_bfloat16() -> None:
    lossy = [name for name in NAMES if not attention.OPTIMIZATION.lossless(Recipe(attention=name))]
    assert lossy == list(FLOAT8)


def test_cudnn_fp8_traces_without_a_gpu() -> None:
    """What torch.compile sees: shapes and dtypes, without the package being there."""
    with FakeTensorMode():
        query = torch.empty(2, 40, 3, 128, dtype=torch.bfloat16)
        out = cudnn_fp8(query, query, query)
    assert out.shape == query.shape
    assert out.dtype == torch.bfloat16


def test_cudnn_fp8_op_meets_torch_librarys_contract() -> None:
    """With the op in plain PyTorch where a GPU's would be; what else opcheck has does arithmetic with float8."""
    given = (float8_heads.to_float8(x, per_head=False)[0] for x in inputs(torch.device("cpu"), tokens=7))
    with torch.library._scoped_library("flux_fast", "IMPL") as implementation:
        implementation.impl("cudnn_attention_float8", cudnn_in_pytorch.cudnn_attention_float8, "CPU")
        torch.library.opcheck(
            cudnn_attention_float8,
            (*given, torch.ones(6, 4)),
            test_utils=("test_faketensor", "test_aot_dispatch_static"),
        )


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_batch_and_tokens_that_fill_no_block(name: str, error_of: Callable) -> None:
    device = torch.device("cuda")
    runs_here(name, device)
    given = inputs(device)
    assert_close(name, backend(name).attend(*given), reference(*given), error_of)


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_parts_of_fused_projections(name: str, error_of: Callable) -> None:
    """Query, key and value as views of one tensor [batch, tokens, 3, heads, head_dim]."""
    device = torch.device("cuda")
    runs_here(name, device)
    given = inputs(device)
    assert_close(name, backend(name).attend(*torch.stack(given, dim=2).unbind(2)), reference(*given), error_of)


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_compiles_without_a_break(name: str, error_of: Callable) -> None:
    device = torch.device("cuda")
    runs_here(name, device)
    given = inputs(device)
    compiled = torch.compile(backend(name).attend, fullgraph=True, dynamic=False)
    assert_close(name, compiled(*given), reference(*given), error_of)


@pytest.mark.gpu
@pytest.mark.parametrize("name", FLOAT8)
def test_float8_inputs_made_beforehand(name: str, error_of: Callable) -> None:
    device = torch.device("cuda")
    runs_here(name, device)
    given, float8 = inputs(device), backend(name).float8
    (q, dq), (k, dk) = (float8_heads.to_float8_by_norm(x, float8.value_per_head) for x in given[:2])
    v, dv = float8_heads.to_float8(given[2], float8.value_per_head)
    out = float8.attend(q, k, float8_heads.lay_out(v, float8.value_layout), torch.stack([dq, dk, dv]))
    assert_close(name, out, reference(*given), error_of)


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_in_a_cuda_graph(name: str, error_of: Callable) -> None:
    """Captured, and replayed on other values."""
    device = torch.device("cuda")
    runs_here(name, device)
    attend, given = backend(name).attend, inputs(device)
    attend(*given)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attend(*given)
    for x in given:
        x.copy_(x.flip(1).roll(1, dims=0))
    graph.replay()
    assert_close(name, out, reference(*given), error_of)
