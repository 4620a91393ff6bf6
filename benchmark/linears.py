"""Time our Linears in float8 and int8 against PyTorch's and what follows: `python -m benchmark.linears --output FILE`.

Those of FLUX.1's Linears that have something to follow, at 1024x1024, one image, 4096 image and 512 text tokens, with a
scale a row. `scaled_mm`: torch._scaled_mm alone, a launch a stream; `apart`: the same and then our Triton kernels, for
GELU and its cast, for query, key and value, for the gated residual; `wgmma`: kernels/wgmma_linear.cu, both streams and
what follows in one launch; `int8`: the same of rows and weights in int8, where an AdaLN gives the rows. They take
turns, each for so long that a GPU at its power limit has come to the clock that it keeps with it. --zeros: of zeros,
which take so little power that the clock stays high: what is left is how well a kernel fills the tensor cores. The
error is against float32, of GELU's results or the Linear's, of the same rounded inputs.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch

from utils.quiet import quiet

with quiet():
    from benchmark import series
    from benchmark.device_timing import captured, sustained
    from recipes import gemm_epilogues, wgmma_linear
    from recipes.quantized_linear import QuantizedLinear, weight_to_float8, weight_to_int8
    from recipes.recipe import Recipe
    from recipes.wgmma_linear import HEAD_DIM
    from utils.errors import Parser, run_command
    from utils.relative_error import relative_error

IMAGE, TEXT, DIM = 4096, 512, 3072
_CALLS = 5  # in a graph
Stream = tuple[QuantizedLinear, Any]  # a layer and its input, fused_blocks' Rows
Form = Callable[[], list[Any]]
HEADER = "linear    form            ms  TFLOP/s   error   MHz"


@dataclass(frozen=True)
class Case:
    """tokens: of each stream; heads: of query, key and value, whose features come before those that go through GELU.
    gated: a result, times a gate, is added to its stream instead."""

    name: str
    tokens: tuple[int, ...]
    out_features: int
    in_features: int
    heads: int
    gated: bool = False

    @property
    def plain(self) -> int:
        return 3 * self.heads * HEAD_DIM

    @property
    def flops(self) -> int:
        return 2 * sum(self.tokens) * self.out_features * self.in_features


def cases() -> list[Case]:
    both = (IMAGE, TEXT)
    return [
        Case("qkv", both, 3 * DIM, DIM, DIM // HEAD_DIM),
        Case("mlp_up", both, 4 * DIM, DIM, 0),
        Case("qkv_mlp", (IMAGE + TEXT,), 7 * DIM, DIM, DIM // HEAD_DIM),
        Case("attn_out", both, DIM, DIM, 0, gated=True),
        Case("mlp_down", both, DIM, 4 * DIM, 0, gated=True),
        Case("out", (IMAGE + TEXT,), DIM, 5 * DIM, 0, gated=True),
    ]


def stream(case: Case, number: int, device: torch.device, zeros: bool, int8: bool = False) -> Stream:
    """A layer of standard normal inputs and as large results, and its input."""
    from recipes.fused_blocks import Rows  # needs triton, which only a machine with a GPU has
    from recipes.kernels.rows import rows_by_norm, rows_to_int8

    random = torch.Generator(device).manual_seed(number)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device, generator=random) * (not zeros)

    cast = weight_to_int8 if int8 else weight_to_float8
    weight, scale = cast(normal(case.out_features, case.in_features) / case.in_features**0.5)
    quantized = SimpleNamespace(qdata=weight, scale=scale, dtype=torch.bfloat16)
    bias = torch.nn.Parameter(normal(case.out_features).bfloat16() / 8, requires_grad=False)
    linear: Any = SimpleNamespace(weight=quantized, bias=bias)
    layer = QuantizedLinear(linear)
    layer.bound(case.heads, HEAD_DIM)
    x = normal(1, case.tokens[number], case.in_features)
    return layer, Rows(*(rows_to_int8(x) if int8 else rows_by_norm(x)))


def _gated(case: Case, streams: Sequence[Stream]) -> Callable[[Any], list[Any]]:
    """Adds what the Linears give to streams, and after an attention norms these, by fused_blocks' kernels that it gets;
    gives nothing."""
    from recipes.fused_blocks import Gated

    device = streams[0][1].scale.device
    random = torch.Generator(device).manual_seed(len(streams))
    gated = []
    for (linear, x), tokens in zip(streams, case.tokens, strict=True):
        sizes = ((case.out_features,), (tokens, case.out_features))
        gate, before = (torch.randn(1, *size, device=device, generator=random).bfloat16() for size in sizes)
        gated.append(Gated(linear, x, gate, before))

    norms = [(torch.zeros_like(one.gate), torch.zeros_like(one.gate), 1e-6) for one in gated]

    def call(kernels: Any) -> list[Any]:
        if case.name == "attn_out":
            kernels.gated_linears_adaln(gated, norms)
        elif len(gated) == 2:
            kernels.gated_linears(gated)
        else:
            before = gated[0].residual
            kernels.gated_linear(gated[0]._replace(residual=before[:, TEXT:]), before[:, :TEXT])
        return []

    return call


def forms(case: Case, streams: Sequence[Stream]) -> dict[str, Form]:
    """What is timed; gives the Linears' results in bfloat16, or rows of GELU's, of one stream after the other."""
    from recipes.fused_blocks import Epilogues, Float8, Rows, bounded
    from recipes.kernels import gelu, qkv

    backend: Any = None  # the attention's, which isn't called
    apart, joined = Float8(backend), Epilogues(backend)
    found: dict[str, Form] = {"scaled_mm": lambda: [apart.linear(*one) for one in streams]}
    if case.gated:
        call = _gated(case, streams)
        return found | {"apart": partial(call, apart), "wgmma": partial(call, joined)}
    if not case.heads:
        return found | {"apart": lambda: apart.gelu_linears(streams), "wgmma": lambda: joined.gelu_linears(streams)}
    tokens = sum(case.tokens)
    like = streams[0][1].scale
    norms = [torch.ones(HEAD_DIM, device=like.device, dtype=torch.bfloat16)] * 2
    angle = torch.linspace(0, 100, tokens * HEAD_DIM // 2, device=like.device).view(tokens, -1)
    rotary = [turn.repeat_interleave(2, dim=1) for turn in (angle.cos(), angle.sin())]
    turns = gemm_epilogues.turns(*rotary)

    def heads_of(projected: torch.Tensor) -> torch.Tensor:
        return projected[..., : case.plain].unflatten(2, (3, case.heads, HEAD_DIM))

    if len(streams) == 2:

        def in_turn() -> list[Any]:
            both = [apart.linear(*one) for one in streams]
            qkv.qkv_norm_rotary_float8(*map(heads_of, both), *norms, *norms, *rotary, 1e-6, "for_wgmma", False)
            return []

        def together() -> list[Any]:
            both = (*bounded(*streams[0]), *bounded(*streams[1]))
            wgmma_linear.wgmma_qkv_linears(*both, *norms, *norms, turns, 1e-6, case.heads, True)
            return []

        return found | {"apart": in_turn, "wgmma": together}
    ((linear, x),) = streams

    def with_mlp_in_turn() -> list[Any]:
        projected = apart.linear(linear, x)
        qkv.qkv_norm_rotary_float8(
            heads_of(projected), None, *norms, None, None, *rotary, 1e-6, "for_wgmma", False
        )  # fmt: skip
        attended = x.values[..., : case.heads * HEAD_DIM]
        return [Rows(*gelu.concat_gelu_float8(attended, projected[..., case.plain :], x.scale))]

    def with_mlp_together() -> list[Any]:
        of_heads = (*norms, turns, 1e-6, case.heads, True)
        _, _, _, *rows = wgmma_linear.wgmma_qkv_gelu_linear(*bounded(linear, x), *of_heads)
        return [Rows(*rows)]

    return found | {"apart": with_mlp_in_turn, "wgmma": with_mlp_together}


def exact(linear: QuantizedLinear, x: Any) -> torch.Tensor:
    """x W^T + b in float32."""
    weight, bias = linear.weight.float() * linear.weight_scale, linear.bias.float()
    return torch.nn.functional.linear(x.values.float() * x.scale, weight, bias)


def error(case: Case, out: list[Any], streams: Sequence[Stream], activated: bool) -> float:
    """The largest stream's; `activated`: of GELU's results."""
    expected = [exact(linear, x) for linear, x in streams]
    if activated:
        expected = [torch.nn.functional.gelu(one[..., case.plain :], approximate="tanh") for one in expected]
    given = [one if isinstance(one, torch.Tensor) else one.values.float() * one.scale for one in out]
    pairs = zip(given, expected, strict=True)
    return max(relative_error(one[..., -other.shape[-1] :], other) for one, other in pairs)


@torch.no_grad()
def measure(case: Case, zeros: bool, device: torch.device) -> dict[str, Any]:
    in_float8, in_int8 = (
        [stream(case, n, device, zeros, int8) for n in range(len(case.tokens))] for int8 in (False, True)
    )
    runs = forms(case, in_float8)
    if not case.gated:
        runs["int8"] = forms(case, in_int8)["wgmma"]
    outputs = {name: run() for name, run in runs.items()}
    times = sustained({name: captured([run] * _CALLS) for name, run in runs.items()}, _CALLS, device)
    found = {}
    for name, out in outputs.items():
        figures = {**times[name], "tflops": case.flops / times[name]["ms"]["median"] / 1e9}
        if not zeros and out:
            streams = in_int8 if name == "int8" else in_float8
            figures["relative_error"] = error(case, out, streams, name != "scaled_mm")
        found[name] = figures
    return {"forms": found}


def line(row: dict[str, Any]) -> str:
    text = []
    for name, figures in row.get("forms", {}).items():
        of_text = f"{figures['relative_error']:.4f}" if "relative_error" in figures else ""
        ms, tflops, clock = figures["ms"]["median"], figures["tflops"], figures["sm_clock_mhz"] or 0
        text.append(f"{row['linear']:<8}  {name:<9}  {ms:7.4f}  {tflops:7.0f}  {of_text:>6}  {clock:4.0f}")
    return "\n".join(text) or f"{row['linear']:<8}"


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--zeros", action="store_true", help="multiply zeros")
    series.add_options(parser)
    arguments = parser.parse_args()

    def command() -> None:
        device = series.check(arguments)
        missing = gemm_epilogues.OPTIMIZATION.needs(Recipe()).missing(device, "bfloat16")
        measurements = [
            series.Measurement(
                {
                    "linear": case.name,
                    **{k: getattr(case, k) for k in ("tokens", "out_features", "in_features", "heads", "gated")},
                },
                partial(measure, case, arguments.zeros, device),
                missing,
            )
            for case in cases()
        ]
        series.run("linears", measurements, HEADER, line, arguments, device, {"zeros": arguments.zeros})

    run_command(command, arguments.debug)


if __name__ == "__main__":
    main()
