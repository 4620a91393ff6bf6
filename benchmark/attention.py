"""Time every attention backend, with its error: `python -m benchmark.attention --tokens 4352 4608 8704 --output FILE`.

24 heads of 128, one image. Each is timed as the fused blocks call it: a backend in float8 from float8 inputs, and to
float8 with a scale a row where it gives that. What the casts before cost stands in benchmark.kernels. The error is
||out - reference|| / ||reference|| of what that call gives, against float32 attention of the same inputs in bfloat16,
so casts to and from float8 are in it: of standard normal ones, and of ones whose query and key have been through
RMSNorm, with weights around each of `--norms`: the larger they are, the farther scores lie apart, and what a backend
does about that may take time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from utils.quiet import quiet

with quiet():
    from benchmark import series
    from benchmark.device_timing import graph_ms
    from recipes import attention, float8_heads
    from recipes.attention_backends import backend
    from recipes.recipe import Recipe
    from utils.errors import Parser, UsageError, run_command
    from utils.relative_error import relative_error

BACKENDS = ("native", "cudnn", "fa3", "fa3_fp8", "triton_fp8", "cudnn_fp8", "wgmma_fp8")
HEADS, HEAD_DIM = 24, 128
Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def inputs(kind: str, tokens: int, device: torch.device, norm: float = 1.0) -> Inputs:
    """Query, key and value [1, tokens, 24, 128] in bfloat16. kind: random or rms_normed, by weights around `norm`."""
    random = torch.Generator(device).manual_seed(0)
    q, k, v = (torch.randn(1, tokens, HEADS, HEAD_DIM, device=device, generator=random) for _ in range(3))
    if kind == "rms_normed":
        weights = norm * (1 + 0.2 * torch.randn(2, HEAD_DIM, device=device, generator=random))
        q, k = (torch.nn.functional.rms_norm(x, (HEAD_DIM,), w, 1e-6) for x, w in zip((q, k), weights, strict=True))
    return q.bfloat16(), k.bfloat16(), v.bfloat16()


def reference(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Attention in float32, a head at a time: the scores of all at once would take gigabytes."""
    out = []
    for head in range(query.shape[2]):
        q, k, v = (x[:, :, head].float() for x in (query, key, value))
        out.append((q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])).softmax(-1) @ v)
    return torch.stack(out, dim=2)


def timed_call(name: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Callable[[], tuple[torch.Tensor, ...]]:
    """What is timed: the backend on what it takes, cast beforehand if that is float8, to what it gives.

    The call returns attention's output first, [1, tokens, 24, 128], and then its scale, if it has one.
    """
    one = backend(name)
    if one.float8 is None:
        return lambda: (one.attend(q, k, v),)
    float8 = one.float8
    (q8, dq), (k8, dk) = (float8_heads.to_float8_by_norm(x, float8.value_per_head) for x in (q, k))
    v8, dv = float8_heads.to_float8(v, float8.value_per_head)
    v8 = float8_heads.lay_out(v8, float8.value_layout)
    descales = torch.stack([dq, dk, dv])
    if (rows := float8.rows) is not None:
        return lambda: rows(q8, k8, v8, descales)
    return lambda: (float8.attend(q8, k8, v8, descales),)


def measure(name: str, tokens: int, norm: float, device: torch.device) -> dict[str, Any]:
    errors = {}
    for kind in ("random", "rms_normed"):
        bfloat16 = inputs(kind, tokens, device, norm)
        call = timed_call(name, *bfloat16)
        out, *scale = call()
        given = out.float() * scale[0][..., None] if scale else out
        errors[kind] = relative_error(given, reference(*bfloat16))
    output = str(out.dtype).removeprefix("torch.")
    ms = graph_ms([call] * 10)
    flops = 4 * HEADS * tokens**2 * HEAD_DIM
    return {"output": output, "ms": ms, "tflops": flops / ms["median"] / 1e9, "relative_error": errors}


def line(row: dict[str, Any]) -> str:
    text = f"{row['tokens']:>6}  {row['norm']:>5g}  {row['backend']:<10}"
    if "ms" in row:
        error = row["relative_error"]
        text += f"  {row['output']:<13}  {row['ms']['median']:7.3f}  {row['tflops']:9.0f}"
        text += f"  {error['random']:13.4f}  {error['rms_normed']:10.4f}"
    return text


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[4352, 4608, 8704])
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=list(BACKENDS))
    parser.add_argument("--norms", type=float, nargs="+", default=[1.0], help="weights of RMSNorm; default: 1")
    series.add_options(parser)
    arguments = parser.parse_args()

    def benchmark() -> None:
        if min(arguments.tokens) < 1:
            raise UsageError(f"--tokens {min(arguments.tokens)}: give at least 1")
        if not all(0 < norm < math.inf for norm in arguments.norms):
            raise UsageError(f"--norms {' '.join(map(str, arguments.norms))}: give positive numbers")
        device = series.check(arguments)
        measurements = [
            series.Measurement(
                {"backend": name, "tokens": tokens, "norm": norm, "heads": HEADS, "head_dim": HEAD_DIM},
                partial(measure, name, tokens, norm, device),
                attention.OPTIMIZATION.refusal(Recipe(dtype="bfloat16", attention=name), device),
            )
            for tokens in arguments.tokens
            for norm in arguments.norms
            for name in arguments.backends
        ]
        header = "tokens  norms  backend     output              ms    TFLOP/s  error: random  rms-normed"
        series.run("attention", measurements, header, line, arguments, device)

    run_command(benchmark, arguments.debug)


if __name__ == "__main__":
    main()
