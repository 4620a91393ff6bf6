"""Each optimization on the real pipeline, eagerly: that it takes hold, and that it keeps the result."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from diffusers import FluxTransformer2DModel
from torch._dynamo.testing import AotEagerAndRecordGraphs
from torchao.quantization import Float8Tensor

import recipes
from recipes import FirstBlockCache, Recipe, RecipeError
from recipes.float8 import quantized_linears

_QKV = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")


def parameters(pipe: object) -> int:
    return sum(p.numel() for part in (pipe.transformer, pipe.vae) for p in part.parameters())


@pytest.fixture(scope="module")
def reference(tiny: Callable, draw: Callable) -> np.ndarray:
    """Two images of plain diffusers in float32."""
    return draw(tiny(), batch=2, steps=2)


def test_bf16_converts_every_module(tiny: Callable, draw: Callable, reference: np.ndarray) -> None:
    pipe = tiny()
    recipes.apply(pipe, Recipe(dtype="bfloat16"))
    modules = {name: m for name, m in pipe.components.items() if isinstance(m, torch.nn.Module)}
    assert set(modules) == {"transformer", "vae", "text_encoder", "text_encoder_2"}
    for name, module in modules.items():
        assert {p.dtype for p in module.parameters()} == {torch.bfloat16}, name
    images = draw(pipe, batch=2, steps=2)
    assert 0 < np.abs(images - reference).max() < 0.25


def test_fused_qkv_keeps_output_and_parameters(tiny: Callable, draw: Callable, reference: np.ndarray) -> None:
    pipe = tiny()
    before = parameters(pipe)
    recipes.apply(pipe, Recipe(fused_qkv=True))
    modules = [*pipe.transformer.named_modules(), *pipe.vae.named_modules()]
    left = [name for name, _ in modules if name.split(".")[-1] in _QKV]
    assert not left
    owners = {name.rpartition(".")[0] for name, _ in modules if name.endswith(("to_qkv", "to_added_qkv"))}
    double = {f"transformer_blocks.{i}.attn" for i in range(2)}
    single = {f"single_transformer_blocks.{i}.attn" for i in range(4)}
    assert owners == {*double, *single, "encoder.mid_block.attentions.0", "decoder.mid_block.attentions.0"}
    assert parameters(pipe) == before
    np.testing.assert_allclose(draw(pipe, batch=2, steps=2), reference, atol=1e-4)


def test_channels_last_keeps_output(tiny: Callable, draw: Callable, reference: np.ndarray) -> None:
    pipe = tiny()
    recipes.apply(pipe, Recipe(channels_last=True))
    weights = [m.weight for m in pipe.vae.modules() if isinstance(m, torch.nn.Conv2d) and m.kernel_size == (3, 3)]
    assert weights
    assert all(w.is_contiguous(memory_format=torch.channels_last) and not w.is_contiguous() for w in weights)
    layouts = []
    hook = pipe.vae.decoder.conv_out.register_forward_hook(
        lambda module, inputs, _: layouts.append(inputs[0].stride(1))
    )
    np.testing.assert_allclose(draw(pipe, batch=2, steps=2), reference, atol=1e-4)
    hook.remove()
    assert layouts == [1], "activations inside the decoder have channels innermost"


def quantized_names(fused: bool) -> set[str]:
    attention = {"to_qkv"} if fused else {"to_q", "to_k", "to_v"}
    added = {"to_added_qkv"} if fused else {"add_q_proj", "add_k_proj", "add_v_proj"}
    double = {*(f"attn.{n}" for n in attention | added | {"to_out.0", "to_add_out"})}
    double |= {f"{stream}.net.{layer}" for stream in ("ff", "ff_context") for layer in ("0.proj", "2")}
    single = {*(f"attn.{n}" for n in attention), "proj_mlp", "proj_out"}
    return {
        *(f"transformer_blocks.{i}.{n}" for i in range(2) for n in double),
        *(f"single_transformer_blocks.{i}.{n}" for i in range(4) for n in single),
    }


# The CPU's matrix product with one scale a tensor is a plain loop, 15 s for these few tokens: once is enough.
@pytest.mark.parametrize(
    ("quantization", "fused"),
    [
        ("float8_per_row", False),
        ("float8_per_row", True),
        pytest.param("float8_per_tensor", True, marks=pytest.mark.slow),
    ],
)
def test_float8_quantizes_the_blocks_and_stays_close(
    tiny: Callable, predict: Callable, error_of: Callable, quantization: str, fused: bool
) -> None:
    plain, pipe = tiny(torch.bfloat16), tiny(torch.bfloat16)
    configuration = copy.deepcopy(torch._inductor.config.get_config_copy())
    applied = recipes.apply(pipe, Recipe(dtype="bfloat16", fused_qkv=fused, quantization=quantization))
    assert torch._inductor.config.get_config_copy() == configuration, "which torchao would change"
    weights = {n: m.weight for n, m in pipe.transformer.named_modules() if isinstance(m, torch.nn.Linear)}
    assert {n for n, w in weights.items() if isinstance(w, Float8Tensor)} == quantized_names(fused)
    assert applied["quantization"] == f"{quantization}, {len(quantized_names(fused))} Linears"
    one = weights["single_transformer_blocks.0.proj_mlp"]
    assert one.qdata.dtype == torch.float8_e4m3fn
    assert one.scale.shape == ((one.shape[0], 1) if quantization == "float8_per_row" else (1, 1))
    # Quantizing to 3 mantissa bits is 2.6 % of rounding a weight and an activation; the residual stream carries less.
    assert 1e-4 < error_of(predict(pipe), predict(plain)) < 0.1


@pytest.mark.parametrize("quantization", ["float8_per_row", "float8_per_tensor"])
def test_float8_is_plain_scaled_mm(tiny: Callable, quantization: str) -> None:
    """One for each Linear, in the graph that compilers get, and no operator of torchao's."""
    pipe = tiny(torch.bfloat16)
    recipes.apply(pipe, Recipe(dtype="bfloat16", fused_qkv=True, quantization=quantization))
    block, graphs = pipe.transformer.single_transformer_blocks[0], AotEagerAndRecordGraphs()
    width = pipe.transformer.inner_dim
    image, text, temb = (torch.randn(*shape, width).to(torch.bfloat16) for shape in ((1, 8), (1, 4), (1,)))
    with torch.no_grad():
        compiled = torch.compile(block, backend=graphs, fullgraph=True)
        compiled(image, text, temb, (torch.ones(12, 128), torch.ones(12, 128)))
    (graph,) = graphs.fw_graphs
    operators = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    assert operators.count("aten._scaled_mm.default") == 3, "query, key and value; the MLP; what comes after both"
    assert not [operator for operator in operators if "torchao" in operator]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_float8_text_encoder_quantizes_t5_and_stays_close(tiny: Callable, error_of: Callable, device: str) -> None:
    plain, pipe = (tiny(torch.bfloat16, torch.device(device)) for _ in range(2))
    pipe.text_encoder_2.encoder.block[0].layer[1].DenseReluDense.wo.float()  # as transformers keeps the real one
    applied = recipes.apply(pipe, Recipe(dtype="bfloat16", float8_text_encoder=True))
    linears = [m for m in pipe.text_encoder_2.modules() if isinstance(m, torch.nn.Linear)]
    assert all(isinstance(m.weight, Float8Tensor) and m.weight.dtype == torch.bfloat16 for m in linears)
    assert applied["float8_text_encoder"] == f"{len(linears)} Linears of T5"
    assert not any(isinstance(p, Float8Tensor) for p in pipe.text_encoder.parameters()), "CLIP stays as it is"
    with torch.no_grad():
        (t5, clip, _), (t5_plain, clip_plain, _) = (p.encode_prompt("two red circles", None) for p in (pipe, plain))
    assert torch.equal(clip, clip_plain)
    assert 1e-3 < error_of(t5, t5_plain) < 0.1


def with_transformer(pipe: object, **config: object) -> object:
    """The pipeline with another transformer, of random weights."""
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel.from_config({**pipe.transformer.config, **config})
    pipe.register_modules(transformer=transformer.to(torch.bfloat16))
    return pipe


@pytest.mark.parametrize("asked", ["bf16,quantization=float8_per_row", "bf16,float8_text_encoder=true"])
def test_a_cpus_older_torch_has_no_scale_per_row(asked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Elsewhere torch._scaled_mm would fail at the first step, on an internal assertion."""
    monkeypatch.setattr(torch, "__version__", "2.11.0+cu130")
    with pytest.raises(RecipeError, match=r"needs PyTorch 2\.12 or newer on a CPU, this is 2\.11\.0\+cu130.*bf16"):
        recipes.check(recipes.parse(asked), torch.device("cpu"))
    recipes.check(recipes.parse("bf16,quantization=float8_per_tensor"), torch.device("cpu"))
    monkeypatch.setattr(torch, "__version__", "2.12.0")
    recipes.check(recipes.parse(asked), torch.device("cpu"))


def test_float8_per_tensor_refuses_what_torchao_would_misread(
    tiny: Callable, predict: Callable, error_of: Callable
) -> None:
    """One head of 128: the output projections are 128 x 128."""
    narrow = {"num_attention_heads": 1, "num_layers": 1, "num_single_layers": 1}
    pipe = with_transformer(tiny(torch.bfloat16), **narrow)
    before = {name: tensor.data_ptr() for name, tensor in pipe.transformer.state_dict().items()}
    with pytest.raises(RecipeError, match=r"to_q, a 128 x 128 weight.*use float8_per_row") as raised:
        recipes.apply(pipe, Recipe(dtype="bfloat16", quantization="float8_per_tensor"))
    assert "\n" not in str(raised.value)
    assert {name: tensor.data_ptr() for name, tensor in pipe.transformer.state_dict().items()} == before
    per_row = with_transformer(tiny(torch.bfloat16), **narrow)
    recipes.apply(per_row, Recipe(dtype="bfloat16", quantization="float8_per_row"))
    assert 1e-4 < error_of(predict(per_row), predict(pipe)) < 0.1


def test_float8_takes_every_shape_of_flux() -> None:
    """At full size, on the meta device: 3072 wide, and nothing that float8 GEMMs or torchao can't take."""
    with torch.device("meta"):
        linears = quantized_linears(FluxTransformer2DModel(guidance_embeds=True))
    assert len(linears) == 19 * 12 + 38 * 5
    shapes = {tuple(linear.weight.shape) for linear in linears.values()}
    assert shapes == {(3072, 3072), (12288, 3072), (3072, 12288), (3072, 15360)}
    assert all(side % 16 == 0 for shape in shapes for side in shape), "what torch._scaled_mm asks of a GPU's operands"


@pytest.mark.gpu
@pytest.mark.parametrize("quantization", ["float8_per_row", "float8_per_tensor"])
@pytest.mark.parametrize("shape", [(3072, 3072), (9216, 3072), (12288, 3072), (3072, 12288), (3072, 15360)])
def test_float8_linear_at_full_size(
    tiny: Callable, error_of: Callable, quantization: str, shape: tuple[int, int]
) -> None:
    """Rounding both operands to 3 mantissa bits is an error of 2.6 % each, 3.7 % together."""
    torch.manual_seed(0)
    pipe = tiny(torch.bfloat16, torch.device("cuda"))
    linear = torch.nn.Linear(shape[1], shape[0], dtype=torch.bfloat16, device="cuda")
    pipe.transformer.single_transformer_blocks[0].proj_out = linear
    x = torch.randn(4608, shape[1], dtype=torch.bfloat16, device="cuda")
    with torch.no_grad():
        expected = linear(x).float()
        recipes.apply(pipe, Recipe(dtype="bfloat16", quantization=quantization))
        assert isinstance(linear.weight, Float8Tensor)
        assert 0.01 < error_of(linear(x).float(), expected) < 0.05


def test_first_block_cache_at_threshold_zero_computes_everything(tiny: Callable, draw: Callable) -> None:
    pipe = tiny()
    recipes.apply(pipe, Recipe(cache=FirstBlockCache(0.0)))
    np.testing.assert_allclose(draw(pipe, steps=4), draw(tiny(), steps=4), atol=1e-5)


def test_first_block_cache_skips_and_forgets_between_calls(tiny: Callable, draw: Callable) -> None:
    pipe = tiny()
    recipes.apply(pipe, Recipe(cache=FirstBlockCache(1e6)))
    calls = []
    pipe.transformer.single_transformer_blocks[-1].attn.register_forward_hook(lambda *_: calls.append(1))
    first = draw(pipe, steps=4)
    assert len(calls) == 1, "the blocks after the first run in the first step alone"
    assert np.array_equal(draw(pipe, steps=4), first), "a second call starts with an empty cache"
    assert len(calls) == 2
    assert np.abs(first - draw(tiny(), steps=4)).max() > 1e-4
