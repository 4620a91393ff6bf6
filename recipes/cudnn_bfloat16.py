"""cuDNN's attention in bfloat16, as PyTorch has it, as a custom op that torch.compile and torch.export take whole.

It says itself which kernel computes it, where `scaled_dot_product_attention` leaves that to the process it runs in. The
kernel reads any strides whose last is 1 and lays its output out as the query is, dense: [batch, tokens, heads,
head_dim] goes in and comes out without a copy, query, key and value being parts of one tensor or not.

Source: `_scaled_dot_product_cudnn_attention` of ATen, native/transformers/cuda/attention.cu and native/cudnn/MHA.cpp.
"""

from __future__ import annotations

import torch


@torch.library.custom_op("flux_fast::cudnn_attention", mutates_args=())
def cudnn_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Attention over [batch, tokens, heads, head_dim] in bfloat16 or float16, head_dim contiguous, not causal.

    Returns the query's shape and dtype, contiguous.

    Raises:
        RuntimeError: cuDNN has no kernel for this dtype, head_dim or GPU.
    """
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    # Of the nine results the first is the output; without autograd nobody wants the log-sum-exp.
    out = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, compute_log_sumexp=False)[0]
    return out.transpose(1, 2).contiguous()


@cudnn_attention.register_fake
def _(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return query.new_empty(query.shape)
