"""cuDNN's attention in bfloat16: what is handed to ATen's kernel, and how, with a stand-in for it on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from recipes import Recipe, attention
from recipes.cudnn_bfloat16 import cudnn_attention


class Kernel:
    """`aten::_scaled_dot_product_cudnn_attention` in plain PyTorch; keeps the last call's inputs and output."""

    def __init__(self) -> None:
        self.calls = 0
        self.inputs: tuple[Tensor, ...] = ()
        self.out = torch.empty(0)

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, attn_bias: Tensor | None, compute_log_sumexp: bool,
        dropout_p: float = 0.0, is_causal: bool = False, return_debug_mask: bool = False, *, scale: float | None = None,
    ) -> tuple:  # fmt: skip
        assert attn_bias is None
        assert scale is None
        assert (compute_log_sumexp, dropout_p, is_causal, return_debug_mask) == (False, 0.0, False, False)
        self.calls += 1
        self.inputs = (query, key, value)
        self.out = torch.empty_like(query)  # dense, in the order of the query's strides, as cuDNN's
        self.out.copy_(torch.nn.functional.scaled_dot_product_attention(query, key, value))
        empty = self.out.new_empty(0)
        return self.out, empty, empty, empty, query.shape[2], key.shape[2], empty, empty, empty


@pytest.fixture
def kernel() -> Iterator[Kernel]:
    stand_in, library = Kernel(), torch.library.Library("aten", "IMPL")
    library.impl("_scaled_dot_product_cudnn_attention", stand_in, "CPU")
    yield stand_in
    library._destroy()


def parts(batch: int = 2, tokens: int = 11, heads: int = 3, head_dim: int = 16) -> tuple[Tensor, ...]:
    """Query, key and value [batch, tokens, heads, head_dim] as parts of one tensor."""
    random = torch.Generator().manual_seed(0)
    return torch.randn(batch, tokens, 3, heads, head_dim, generator=random).bfloat16().unbind(2)


def native(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    views = (x.transpose(1, 2) for x in (query, key, value))
    return torch.nn.functional.scaled_dot_product_attention(*views).transpose(1, 2)


@pytest.mark.parametrize("size", [(2, 11, 3, 16), (1, 1, 3, 16), (2, 11, 1, 16)])
def test_neither_inputs_nor_output_are_copied(kernel: Kernel, size: tuple[int, ...]) -> None:
    given = parts(*size)
    out = cudnn_attention(*given)
    for view, x in zip(kernel.inputs, given, strict=True):
        assert view.data_ptr() == x.data_ptr()
        assert view.shape == (size[0], size[2], size[1], size[3])
    assert out.data_ptr() == kernel.out.data_ptr()
    assert out.shape == given[0].shape
    assert out.is_contiguous()
    torch.testing.assert_close(out, native(*given))


def test_other_layouts_give_the_same(kernel: Kernel) -> None:
    """A query whose tokens lie within its heads gives an output laid out so, which has to be copied."""
    given = tuple(x.transpose(1, 2).contiguous().transpose(1, 2) for x in parts())
    out = cudnn_attention(*given)
    assert out.is_contiguous()
    torch.testing.assert_close(out, native(*given))


def test_op_meets_torch_librarys_contract(kernel: Kernel) -> None:
    utils = ("test_schema", "test_faketensor", "test_aot_dispatch_static")
    torch.library.opcheck(cudnn_attention, parts(), test_utils=utils)
    asked = tuple(x.clone().requires_grad_() for x in parts())
    torch.library.opcheck(cudnn_attention, asked, test_utils="test_autograd_registration")


def test_compiled_graph_calls_it(kernel: Kernel) -> None:
    given = parts()
    compiled = torch.compile(cudnn_attention, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*given), native(*given))
    assert kernel.calls == 1
    assert kernel.inputs[0].data_ptr() == given[0].data_ptr()


def test_exported_blocks_name_the_kernel(tiny: Callable, error_of: Callable, kernel: Kernel) -> None:
    pipe, random = tiny(torch.bfloat16), torch.Generator().manual_seed(0)
    attention.OPTIMIZATION.apply(pipe, Recipe(attention="cudnn"))
    block = pipe.transformer.single_transformer_blocks[0]
    angles = torch.rand(21, 128, generator=random)
    text, image, temb = (torch.randn(*n, generator=random).bfloat16() for n in ((1, 5, 256), (1, 16, 256), (1, 256)))
    arguments = {
        "hidden_states": image,
        "encoder_hidden_states": text,
        "temb": temb,
        "image_rotary_emb": (angles.cos(), angles.sin()),
    }
    with torch.no_grad():
        exported = torch.export.export(block, (), arguments, strict=False)
        outputs = exported.module()(**arguments)
        pipe.transformer.set_attn_processor(type(tiny().transformer.single_transformer_blocks[0].attn.processor)())
        expected = block(**arguments)
    assert [node for node in exported.graph.nodes if node.target == torch.ops.flux_fast.cudnn_attention.default]
    assert kernel.calls == 1
    for ours, theirs in zip(outputs, expected, strict=True):
        assert error_of(ours.float(), theirs.float()) < 0.01


def test_whole_pipeline_draws_the_same(tiny: Callable, draw: Callable, kernel: Kernel) -> None:
    plain, changed = tiny(), tiny()
    attention.OPTIMIZATION.apply(changed, Recipe(attention="cudnn"))
    np.testing.assert_allclose(draw(changed, batch=2), draw(plain, batch=2), atol=1e-4)
    assert kernel.calls == 6
