"""FlashAttention-3: refused without a GPU; its ops and what calls them, with a stand-in for the kernel."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import re
import sys
import types
from collections.abc import Callable

import numpy as np
import pytest
import torch

import recipes
from recipes import Recipe, RecipeError, attention, fused_qkv
from recipes.flash_attention_3 import _from_hub as from_hub
from recipes.flash_attention_3 import flash_attention_3, flash_attention_3_float8, flash_attention_3_fp8, loading_error
from utils.errors import UserError

FA3_FP8 = Recipe(attention="fa3_fp8")
BACKENDS = [Recipe(dtype="bfloat16", attention="fa3"), FA3_FP8]


@pytest.mark.parametrize("recipe", BACKENDS)
def test_raises_on_cpu(tiny: Callable, recipe: Recipe) -> None:
    with pytest.raises(RecipeError, match=f"attention={recipe.attention} needs a cuda device"):
        recipes.apply(tiny(), recipe)


@pytest.mark.parametrize("call", [flash_attention_3, flash_attention_3_fp8])
def test_fake_has_the_querys_shape_and_dtype(call: Callable) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        query = torch.empty(3, 20, 2, 128, dtype=torch.bfloat16).transpose(0, 1).contiguous().transpose(0, 1)
        out = call(query, torch.empty(3, 7, 2, 128), torch.empty(3, 7, 2, 128))
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
        # All else as published; a scale of None is that of head_dim.
        others = (softmax_scale, causal, qv, tuple(window_size), attention_chunk, softcap, num_splits, pack_gqa)
        assert others == (None, False, None, (-1, -1), 0, 0.0, 1, None)
        assert (deterministic, sm_margin) == (False, 0)
        # The kernel reads head_dim values in a row, and takes three descales or none.
        assert all(x.stride(-1) == 1 for x in (q, k, v))
        ones = torch.ones(q.shape[0], q.shape[2])
        quantized = [d is not None for d in (q_descale, k_descale, v_descale)]
        assert all(quantized) == any(quantized) == (q.dtype == torch.float8_e4m3fn)
        inputs = ((q, q_descale), (k, k_descale), (v, v_descale))
        # [batch, tokens, heads, head_dim] -> [batch, heads, tokens, head_dim]
        query, key, value = (
            (x.float() * (ones if d is None else d)[:, None, :, None]).transpose(1, 2) for x, d in inputs
        )
        weights = (query @ key.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
        out = (weights @ value).transpose(1, 2).contiguous()
        return out.to(torch.bfloat16 if q.dtype == torch.float8_e4m3fn else q.dtype)

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
    attention.OPTIMIZATION.apply(pipe, FA3_FP8)
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
        attention.OPTIMIZATION.apply(pipe, FA3_FP8)
        if fused:
            fused_qkv.OPTIMIZATION.apply(pipe, Recipe(fused_qkv=True))
        quantized = attn(**inputs)
    native, quantized = ((x,) if isinstance(x, torch.Tensor) else x for x in (native, quantized))
    assert len(native) == len(quantized) == (1 if text is None else 2)
    for ours, theirs in zip(quantized, native, strict=True):
        assert ours.shape == theirs.shape
        assert 1e-5 < error_of(ours, theirs) < 0.08


def test_bfloat16_processor_equals_native(tiny: Callable, predict: Callable, error_of: Callable, kernel: list) -> None:
    pipe = tiny()
    reference = predict(pipe, batch=2)
    attention.OPTIMIZATION.apply(pipe, Recipe(attention="fa3"))
    assert error_of(predict(pipe, batch=2), reference) < 1e-5
    assert len(kernel) == 2 + 4
    assert all(call["q_descale"] is None and call["q"].shape == (2, 24, 2, 128) for call in kernel)


def test_compiles_without_a_break(kernel: list, error_of: Callable) -> None:
    q, k, v = (torch.randn(2, 6, 2, 16, dtype=torch.bfloat16) for _ in range(3))
    compiled = torch.compile(lambda *x: flash_attention_3_fp8(*x) + flash_attention_3(*x), fullgraph=True)
    expected = flash_attention_3_fp8(q, k, v) + flash_attention_3(q, k, v)
    assert error_of(compiled(q, k, v).float(), expected.float()) < 0.02


@pytest.mark.parametrize("answer", [OSError("no network"), ValueError("no build for this torch")])
def test_hub_kernel_that_cannot_be_had(answer: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def get_kernel(repo_id: str, revision: str | None = None, version: int | None = None) -> object:
        asked.append((repo_id, revision, version))
        raise answer

    module = types.ModuleType("kernels")
    module.get_kernel = get_kernel
    monkeypatch.setitem(sys.modules, "kernels", module)
    monkeypatch.setitem(sys.modules, "flash_attn_interface", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=re.escape(f"({answer}): install flash_attn_interface")) as raised:
        flash_attention_3(*(torch.zeros(1, 4, 1, 16, dtype=torch.bfloat16) for _ in range(3)))
    assert "\n" not in str(raised.value)
    assert asked == [("kernels-community/flash-attn3", None, 1)]


def test_refused_where_the_hub_has_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a Hopper GPU with the package `kernels` alone: said before anything is loaded or compiled, and asked once."""
    asked = []

    def get_kernel(repo_id: str, version: int) -> object:
        asked.append(repo_id)
        raise FileNotFoundError("no build for this PyTorch\n  in: build/")

    module = types.ModuleType("kernels")
    module.get_kernel = get_kernel
    monkeypatch.setitem(sys.modules, "kernels", module)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if name == "kernels" else None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    loading_error.cache_clear()
    try:
        refusals = [attention.OPTIMIZATION.refusal(recipe, torch.device("cuda")) for recipe in BACKENDS]
    finally:
        loading_error.cache_clear()
    assert refusals == [
        f"attention={recipe.attention} needs its kernel: FlashAttention-3 can't be loaded from kernels-community/"
        "flash-attn3 (no build for this PyTorch): install flash_attn_interface (see requirements-gpu.txt) or use "
        "attention=cudnn"
        for recipe in BACKENDS
    ]
    assert len(asked) == 1


def test_not_refused_where_the_kernel_loads(kernel: list, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    loading_error.cache_clear()
    try:
        assert attention.OPTIMIZATION.refusal(FA3_FP8, torch.device("cuda")) is None
    finally:
        loading_error.cache_clear()


def test_hub_kernel_is_taken_where_there_is_no_module(kernel: list, monkeypatch: pytest.MonkeyPatch) -> None:
    built = sys.modules["flash_attn_interface"]
    module = types.ModuleType("kernels")
    module.get_kernel = lambda repo_id, version: built
    monkeypatch.setitem(sys.modules, "kernels", module)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    from_hub.cache_clear()
    try:
        flash_attention_3(*(torch.zeros(1, 4, 1, 16, dtype=torch.bfloat16) for _ in range(3)))
    finally:
        from_hub.cache_clear()
    assert len(kernel) == 1


def test_ops_meet_torch_librarys_contract(kernel: list) -> None:
    q, k, v = (torch.randn(2, 6, 2, 16, dtype=torch.bfloat16) for _ in range(3))
    utils = ("test_schema", "test_faketensor", "test_aot_dispatch_static")
    torch.library.opcheck(flash_attention_3, (q, k, v), test_utils=utils)
    asked = tuple(x.clone().requires_grad_() for x in (q, k, v))
    torch.library.opcheck(flash_attention_3, asked, test_utils="test_autograd_registration")
    quantized = [x.to(torch.float8_e4m3fn) for x in (q, k, v)]
    inputs = (*quantized, torch.ones(3, 2, 2))
    # The others do arithmetic with float8.
    torch.library.opcheck(flash_attention_3_float8, inputs, test_utils=("test_faketensor", "test_aot_dispatch_static"))


def test_whole_pipeline_draws(tiny: Callable, draw: Callable, kernel: list) -> None:
    pipe = tiny(torch.bfloat16)
    attention.OPTIMIZATION.apply(pipe, FA3_FP8)
    assert np.isfinite(draw(pipe, batch=2, steps=1)).all()
    assert len(kernel) == 6
