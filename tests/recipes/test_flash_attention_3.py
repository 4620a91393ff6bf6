"""FlashAttention-3 in float8: refused without a GPU; its op and processor, with a stand-in for the kernel."""

from __future__ import annotations

import importlib.machinery
import sys
import types
from collections.abc import Callable

import numpy as np
import pytest
import torch

import recipes
from recipes import Recipe, RecipeError, attention, fused_qkv
from recipes.flash_attention_3 import flash_attention_3_fp8, to_float8

FA3 = Recipe(attention="fa3_fp8")


def test_raises_on_cpu(tiny: Callable) -> None:
    with pytest.raises(RecipeError, match="attention=fa3_fp8 needs a cuda device"):
        recipes.apply(tiny(), FA3)


def test_to_float8_scales_each_head() -> None:
    x = torch.randn(2, 5, 3, 8) * torch.tensor([1e-3, 1.0, 1e3])[None, None, :, None]
    x[1, :, 0] = 0  # a head without a scale
    scaled, descale = to_float8(x)
    assert scaled.dtype == torch.float8_e4m3fn
    assert descale.shape == (2, 3)
    assert descale.dtype == torch.float32
    restored = scaled.float() * descale[:, None, :, None]
    # e4m3 has 3 bits of mantissa: half a unit in the last place is 1/16 of the value; below 2^-6 it is subnormal.
    smallest = descale[:, None, :, None] * 2**-10
    assert ((restored - x).abs() <= x.abs() / 16 + smallest).all()


def test_fake_has_the_querys_shape_and_dtype() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        query = torch.empty(3, 20, 2, 128, dtype=torch.bfloat16).transpose(0, 1).contiguous().transpose(0, 1)
        out = flash_attention_3_fp8(query, torch.empty(3, 7, 2, 128), torch.empty(3, 7, 2, 128))
    assert out.shape == (3, 20, 2, 128)
    assert out.dtype == torch.bfloat16
    assert out.is_contiguous()


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, torch.Tensor]]:
    """`flash_attn_interface` as hopper/flash_attn_interface.py publishes it, in plain PyTorch; the calls it got."""
    calls: list[dict[str, torch.Tensor]] = []

    def flash_attn_func(
        q,
        k,
        v,
        softmax_scale=None,
        causal=False,
        qv=None,
        q_descale=None,
        k_descale=None,
        v_descale=None,
        window_size=(-1, -1),
        attention_chunk=0,
        softcap=0.0,
        num_splits=1,
        pack_gqa=None,
        deterministic=False,
        sm_margin=0,
    ):
        calls.append({"q": q, "k": k, "v": v, "q_descale": q_descale, "k_descale": k_descale, "v_descale": v_descale})
        assert softmax_scale is None
        assert not causal
        inputs = ((q, q_descale), (k, k_descale), (v, v_descale))
        # [batch, tokens, heads, head_dim] -> [batch, heads, tokens, head_dim]
        query, key, value = ((x.float() * d[:, None, :, None]).transpose(1, 2) for x, d in inputs)
        weights = (query @ key.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
        return (weights @ value).transpose(1, 2).to(torch.bfloat16).contiguous()

    module = types.ModuleType("flash_attn_interface")
    module.__spec__ = importlib.machinery.ModuleSpec("flash_attn_interface", None)
    module.flash_attn_func = flash_attn_func
    monkeypatch.setitem(sys.modules, "flash_attn_interface", module)
    return calls


@pytest.mark.parametrize("fused", [False, True])
def test_processor_is_close_to_native(
    tiny: Callable, predict: Callable, error_of: Callable, kernel: list, fused: bool
) -> None:
    pipe = tiny()
    reference = predict(pipe, batch=2)
    # Past `recipes.apply`, which refuses it here: attention first and then fusing, in apply's order.
    attention.OPTIMIZATION.apply(pipe, FA3)
    if fused:
        fused_qkv.OPTIMIZATION.apply(pipe, Recipe(fused_qkv=True))
    output = predict(pipe, batch=2)
    assert 1e-5 < error_of(output, reference) < 0.05
    assert len(kernel) == 2 + 4, "every double and single block"
    for call in kernel:
        for name in "qkv":
            assert call[name].dtype == torch.float8_e4m3fn
            assert call[name].shape == (2, 8 + 16, 2, 128)  # text and image tokens together
            assert call[name].stride(-1) == 1
            assert call[f"{name}_descale"].dtype == torch.float32
            assert call[f"{name}_descale"].shape == (2, 2)  # [batch, heads]
            assert call[f"{name}_descale"].unique().numel() == 4, "each head of each image has its own scale"


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("kind", ["transformer_blocks", "single_transformer_blocks"])
def test_each_kind_of_block(tiny: Callable, error_of: Callable, kernel: list, kind: str, fused: bool) -> None:
    pipe, random = tiny(), torch.Generator().manual_seed(1)
    attn = getattr(pipe.transformer, kind)[0].attn
    text = torch.randn(2, 5, 256, generator=random) if kind == "transformer_blocks" else None
    angles = torch.rand(5 + 16 if text is not None else 16, 128, generator=random)
    inputs = {
        "hidden_states": torch.randn(2, 16, 256, generator=random),
        "encoder_hidden_states": text,
        "image_rotary_emb": (angles.cos(), angles.sin()),
    }
    with torch.no_grad():
        native = attn(**inputs)
        attention.OPTIMIZATION.apply(pipe, FA3)
        if fused:
            fused_qkv.OPTIMIZATION.apply(pipe, Recipe(fused_qkv=True))
        quantized = attn(**inputs)
    native, quantized = ((x,) if isinstance(x, torch.Tensor) else x for x in (native, quantized))
    assert len(native) == len(quantized) == (1 if text is None else 2)
    for ours, theirs in zip(quantized, native, strict=True):
        assert ours.shape == theirs.shape
        assert 1e-5 < error_of(ours, theirs) < 0.08


def test_op_meets_torch_librarys_contract(kernel: list) -> None:
    q, k, v = (torch.randn(2, 6, 2, 16, dtype=torch.bfloat16) for _ in range(3))
    torch.library.opcheck(flash_attention_3_fp8, (q, k, v), test_utils=("test_schema", "test_faketensor"))


def test_whole_pipeline_draws(tiny: Callable, draw: Callable, kernel: list) -> None:
    pipe = tiny(torch.bfloat16)
    attention.OPTIMIZATION.apply(pipe, FA3)
    assert np.isfinite(draw(pipe, batch=2, steps=1)).all()
    assert len(kernel) == 6
