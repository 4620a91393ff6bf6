"""cuDNN's float8 attention through its graph API (the package nvidia-cudnn-frontend), as a custom op.

cuDNN scales whole tensors, not heads. On Hopper its float8 kernel writes float8 only: the output, a weighted mean of
the values, can't exceed them, so the values' own scale fits it. One graph is built for each shape and device, in some
milliseconds, and kept.

Source: `sdpa_fp8` in docs/operations/Attention.md of NVIDIA/cudnn-frontend.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch

from recipes.float8_heads import to_float8

_PROBABILITIES_SCALE = 256.0  # they lie in 0..1 before the cast
# Scalars lie 16 bytes apart: cuDNN takes every tensor to be aligned so.
_SCALARS = ("descale_q", "descale_k", "descale_v", "descale_s", "scale_s", "scale_o")


@dataclass(frozen=True)
class _Graph:
    """A built graph with its tensors by name, and the bytes of scratch memory that it wants."""

    graph: Any
    tensors: dict[str, Any]
    workspace_bytes: int


@functools.cache
def _handle(device: int) -> Any:
    import cudnn

    with torch.cuda.device(device):
        return cudnn.create_handle()


@functools.cache
def _graph(device: int, query: tuple, key: tuple, value: tuple, out: tuple) -> _Graph:
    """query, key, value, out: each (shape, strides) as [batch, heads, tokens, head_dim].

    None is ever let go: a CUDA graph that captured its kernels may be replayed for as long as the process lives.
    """
    import cudnn

    fp8, fp32 = cudnn.data_type.FP8_E4M3, cudnn.data_type.FLOAT
    graph = cudnn.pygraph(io_data_type=fp8, intermediate_data_type=fp32, compute_data_type=fp32, handle=_handle(device))
    inputs = {
        name: graph.tensor(name=name, dim=list(shape), stride=list(strides), data_type=fp8)
        for name, (shape, strides) in (("q", query), ("k", key), ("v", value))
    }
    one = [1, 1, 1, 1]
    inputs |= {name: graph.tensor(name=name, dim=one, stride=one, data_type=fp32) for name in _SCALARS}
    o, _, amax_s, amax_o = graph.sdpa_fp8(
        **inputs, generate_stats=False, attn_scale=1 / math.sqrt(query[0][-1]), use_causal_mask=False, name="sdpa"
    )
    o.set_output(True).set_dim(list(out[0])).set_stride(list(out[1])).set_data_type(fp8)
    for amax in (amax_s, amax_o):
        amax.set_output(True).set_dim(one).set_stride(one).set_data_type(fp32)
    graph.validate()
    graph.build_operation_graph()
    graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
    graph.check_support()
    graph.build_plans()
    return _Graph(graph, {**inputs, "o": o, "amax_s": amax_s, "amax_o": amax_o}, graph.get_workspace_size())


@torch.library.custom_op("flux_fast::cudnn_attention_float8", mutates_args=())
def cudnn_attention_float8(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scalars: torch.Tensor
) -> torch.Tensor:
    """Attention over float8_e4m3fn [batch, tokens, heads, head_dim], not causal; the same in float8, contiguous.

    scalars [6, 4] float32, of which the first column counts: the descales of query, key, value and probabilities, the
    scales of probabilities and output.
    """
    import cudnn

    out = query.new_empty(query.shape)
    by_name = {"q": query, "k": key, "v": value, "o": out}
    views = {name: x.transpose(1, 2) for name, x in by_name.items()}
    device = query.get_device()
    built = _graph(device, *((tuple(x.shape), x.stride()) for x in views.values()))
    amax = query.new_empty((2, 4), dtype=torch.float32)
    pointers = {
        **views,
        **{name: scalars[i, :1].view(1, 1, 1, 1) for i, name in enumerate(_SCALARS)},
        "amax_s": amax[0, :1].view(1, 1, 1, 1),
        "amax_o": amax[1, :1].view(1, 1, 1, 1),
    }
    workspace = query.new_empty((max(built.workspace_bytes, 1),), dtype=torch.uint8)
    handle = _handle(device)
    cudnn.set_stream(handle=handle, stream=torch.cuda.current_stream(device).cuda_stream)
    built.graph.execute({built.tensors[name]: x for name, x in pointers.items()}, workspace, handle=handle)
    return out


@cudnn_attention_float8.register_fake
def _(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scalars: torch.Tensor) -> torch.Tensor:
    return query.new_empty(query.shape)


def rows_from_float8(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, descales: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over float8_e4m3fn [batch, tokens, heads, head_dim], in the same, and its scale [batch, tokens, 1].

    descales [3, batch, heads] float32, of which all of a part are the same.
    """
    q, k, v = descales[:, 0, 0].unbind(0)
    s = torch.full_like(q, _PROBABILITIES_SCALE)
    scalars = torch.stack([q, k, v, 1 / s, s, 1 / v])[:, None].expand(-1, 4).contiguous()
    out = cudnn_attention_float8(query, key, value, scalars)
    return out, v.expand(*out.shape[:2], 1).contiguous()


def attention_from_float8(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, descales: torch.Tensor
) -> torch.Tensor:
    """`rows_from_float8` in bfloat16."""
    out, scale = rows_from_float8(query, key, value, descales)
    return (out.float() * scale[..., None]).to(torch.bfloat16)


def cudnn_fp8(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Attention over [batch, tokens, heads, head_dim], computed in float8; returns the query's shape and dtype."""
    (q, q_descale), (k, k_descale), (v, v_descale) = (to_float8(x, per_head=False) for x in (query, key, value))
    return attention_from_float8(q, k, v, torch.stack([q_descale, k_descale, v_descale])).to(query.dtype)
