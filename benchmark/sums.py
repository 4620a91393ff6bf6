"""What sums of float8 products lose on a Hopper GPU: `python -m benchmark.sums --output FILE`.

Its tensor cores align what they add up to the largest summand, the sum so far included, and cut off what then lies too
far down. `fast`: torch._scaled_mm with fast accumulation, which leaves all of a sum to them (torchao's default);
`promoted`: without it, which takes them out every few products; `wgmma`: our own kernel. Of rows of normal numbers; of
positive ones; and of those that lie along rows of the weight, whose sums are the largest that there are. The error is
against float64, of the same rounded operands: a bfloat16 result alone has 0.0017. Too small by: along the exact result.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from utils.quiet import quiet

with quiet():
    from benchmark import series
    from recipes import gemm_epilogues, wgmma_linear
    from recipes.quantized_linear import ROW, weight_to_float8
    from recipes.recipe import Recipe
    from utils.relative_error import relative_error

KINDS = ("normal", "positive", "along")
DEPTHS = (3072, 12288, 15360)  # of FLUX.1's Linears
_ROWS = 256  # of both operands
HEADER = "rows       depth  sums       error  too small by"


def operands(kind: str, depth: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    """x [rows, depth] float8_e4m3fn, none longer than `ROW`, weight [columns, depth] float8_e4m3fn, and its scale
    [columns, 1]."""
    random = torch.Generator(device).manual_seed(depth)
    draw = torch.rand if kind == "positive" else torch.randn
    x, rows = (draw(_ROWS, depth, device=device, generator=random) for _ in range(2))
    weight, scale = weight_to_float8(rows)
    if kind == "along":
        x = weight.float()
    # Rounding to float8 makes a row at most 18/17 times as long.
    return (x * (17 / 18 * ROW / x.norm(dim=1, keepdim=True))).to(torch.float8_e4m3fn), weight, scale


def figures(out: torch.Tensor, exact: torch.Tensor) -> dict[str, float]:
    """Of a result and what it should be, both [rows, columns]."""
    out = out.double()
    shrunk = 1 - (out * exact).sum() / exact.square().sum()
    return {"relative_error": relative_error(out, exact), "too_small_by": shrunk.item()}


def measure(kind: str, depth: int, device: torch.device) -> dict[str, Any]:
    x, weight, scale = operands(kind, depth, device)
    exact = x.double() @ (weight.double() * scale).T
    one = scale.new_ones(_ROWS, 1)
    scales: dict[str, Any] = {"scale_a": one, "scale_b": scale.T, "out_dtype": torch.bfloat16}
    zeros = x.new_zeros(1, _ROWS, _ROWS, dtype=torch.bfloat16)
    of_linear = x[None], one[None], weight, scale, zeros[0, 0]
    outputs = {
        "fast": torch._scaled_mm(x, weight.T, use_fast_accum=True, **scales),
        "promoted": torch._scaled_mm(x, weight.T, use_fast_accum=False, **scales),
        "wgmma": wgmma_linear.wgmma_gated_linear(*of_linear, torch.ones_like(zeros[:, 0]), zeros, None)[0],
    }
    return {"sums": {name: figures(out, exact) for name, out in outputs.items()}}


def line(row: dict[str, Any]) -> str:
    about = f"{row['rows']:<9}{row['depth']:>7}"
    text = [
        f"{about}  {name:<8}  {found['relative_error']:.4f}       {found['too_small_by']:+.4f}"
        for name, found in row.get("sums", {}).items()
    ]
    return "\n".join(text) or about


def measurements(device: torch.device) -> list[series.Measurement]:
    missing = gemm_epilogues.OPTIMIZATION.needs(Recipe()).missing(device, "bfloat16")
    return [
        series.Measurement({"rows": kind, "depth": depth}, partial(measure, kind, depth, device), missing)
        for kind in KINDS
        for depth in DEPTHS
    ]


def main() -> None:
    series.main("sums", __doc__, measurements, HEADER, line)


if __name__ == "__main__":
    main()
