"""Time the fused kernels against what Inductor makes of their references: `python -m benchmark.kernels --output FILE`.

Shapes are those of FLUX.1 at 1024x1024: 4096 image and 512 text tokens, one image. GB/s counts each input and output
of the fused form once; inputs rotate through more memory than the second-level cache holds.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from utils.quiet import quiet

with quiet():
    from benchmark import series
    from benchmark.device_timing import graph_ms
    from recipes.float8_heads import E4M3_MAX, SMALLEST_AMAX, lay_out

TEXT, IMAGE, DIM, HEADS, HEAD_DIM = 512, 4096, 3072, 24, 128
SIDE = 1024  # of the VAE's image, in pixels
ROTATE_BYTES = 256 * 2**20
EPS = 1e-6


@dataclass(frozen=True)
class Case:
    """A fused kernel and its reference, which take the same `arguments()`; `unread`: the share of them not needed."""

    name: str
    fused: Callable[..., Any]
    unfused: Callable[..., Any]
    arguments: Callable[[], tuple]
    unread: float = 0.0


def bfloat16(function: Callable[..., Any]) -> Callable[..., Any]:
    """A reference whose float32 outputs are rounded as the kernel's are."""

    def rounded(*arguments: Any) -> Any:
        out = function(*arguments)
        return tuple(x.bfloat16() for x in out) if isinstance(out, tuple) else out.bfloat16()

    return rounded


def cases(device: torch.device) -> list[Case]:
    from recipes.kernels import adaln, cast, gelu, group_norm, qkv, residual, rows

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device, dtype=torch.bfloat16)

    def pixels() -> torch.Tensor:
        return normal(1, 128, SIDE, SIDE).contiguous(memory_format=torch.channels_last)

    def modulation(parts: int) -> tuple[torch.Tensor, ...]:
        return normal(1, parts * DIM).chunk(parts, dim=1)

    def joint() -> tuple[torch.Tensor, torch.Tensor]:
        text, image = normal(1, TEXT + IMAGE, DIM).split([TEXT, IMAGE], dim=1)
        return image, text

    def of_qkv(text: bool) -> tuple:
        image_tokens = IMAGE if text else TEXT + IMAGE
        angles = torch.rand(TEXT + IMAGE, HEAD_DIM // 2, device=device).repeat_interleave(2, dim=1)
        norms = [normal(HEAD_DIM) for _ in range(4)] if text else [normal(HEAD_DIM), normal(HEAD_DIM), None, None]
        streams = [normal(1, n, 3, HEADS, HEAD_DIM) if n else None for n in (image_tokens, TEXT if text else 0)]
        return (*streams, *norms, angles.cos(), angles.sin(), EPS)

    def unfused_qkv(image, text, norm_q, norm_k, text_q, text_k, cos, sin, eps):
        out = qkv.reference(image, text, (norm_q, norm_k), None if text is None else (text_q, text_k), cos, sin, eps)
        return out[:, :, : 2 if text is None else 3].bfloat16()

    def unfused_qkv_float8(image, text, norm_q, norm_k, text_q, text_k, cos, sin, eps, layout, per_head):
        out = qkv.reference(image, text, (norm_q, norm_k), None if text is None else (text_q, text_k), cos, sin, eps)
        amax = out.abs().amax(dim=(1, 4)).clamp(min=SMALLEST_AMAX)  # [batch, 3, heads]
        scaled = (out * (E4M3_MAX / amax)[:, None, :, :, None]).to(torch.float8_e4m3fn)
        return scaled[:, :, :2].contiguous(), lay_out(scaled[:, :, 2], layout).contiguous(), amax

    return [
        Case("adaln", adaln.adaln, bfloat16(adaln.reference), lambda: (*joint(), *modulation(2), EPS)),
        Case("adaln_float8", adaln.adaln_float8, adaln.reference_float8, lambda: (*joint(), *modulation(2), EPS)),
        Case("adaln_int8", adaln.adaln_int8, adaln.reference_int8, lambda: (*joint(), *modulation(2), EPS)),
        Case(
            "adaln_int8, two streams",
            adaln.adaln_int8_streams,
            lambda image, text, a, b, c, d, eps: (
                *adaln.reference_int8(image, None, a, b, eps),
                *adaln.reference_int8(text, None, c, d, eps),
            ),
            lambda: (normal(1, IMAGE, DIM), normal(1, TEXT, DIM), *modulation(6)[:2], *modulation(6)[:2], EPS),
        ),
        Case("rows_float8", cast.rows_float8, rows.rows_to_float8, lambda: (normal(1, IMAGE, DIM),)),
        Case(
            "gelu_float8",
            gelu.gelu_float8,
            lambda hidden: gelu.reference_float8(None, hidden),
            lambda: (normal(1, IMAGE, 4 * DIM),),
        ),
        Case(
            "concat_gelu",
            gelu.concat_gelu,
            bfloat16(gelu.reference),
            lambda: (normal(1, TEXT + IMAGE, DIM), normal(1, TEXT + IMAGE, 4 * DIM)),
        ),
        Case(
            "concat_gelu_float8",
            gelu.concat_gelu_float8,
            gelu.reference_float8,
            lambda: (normal(1, TEXT + IMAGE, DIM), normal(1, TEXT + IMAGE, 4 * DIM)),
        ),
        Case(
            "gated_residual",
            residual.gated_residual,
            bfloat16(residual.reference),
            lambda: (normal(1, TEXT + IMAGE, DIM), *modulation(1), *joint()),
        ),
        Case(
            "gated_residual_adaln",
            residual.gated_residual_adaln,
            bfloat16(residual.reference_adaln),
            lambda: (normal(1, IMAGE, DIM), *modulation(1), normal(1, IMAGE, DIM), *modulation(2), EPS),
        ),
        Case(
            "gated_residual_adaln_float8",
            residual.gated_residual_adaln_float8,
            residual.reference_adaln_float8,
            lambda: (normal(1, IMAGE, DIM), *modulation(1), normal(1, IMAGE, DIM), *modulation(2), EPS),
        ),
        Case(
            "bias, group_norm, SiLU",
            group_norm.group_norm,
            bfloat16(group_norm.reference),
            lambda: (pixels(), normal(128), normal(128), 32, EPS, True, normal(128)),
        ),
        Case("qk_norm_rotary, double", qkv.qk_norm_rotary, unfused_qkv, lambda: of_qkv(True)),
        Case("qk_norm_rotary, single", qkv.qk_norm_rotary, unfused_qkv, lambda: of_qkv(False), unread=1 / 3),
        Case(
            "qkv_norm_rotary_float8, double",
            qkv.qkv_norm_rotary_float8,
            unfused_qkv_float8,
            lambda: (*of_qkv(True), "for_wgmma", False),
        ),
        Case(
            "qkv_norm_rotary_float8, single",
            qkv.qkv_norm_rotary_float8,
            unfused_qkv_float8,
            lambda: (*of_qkv(False), "for_wgmma", False),
        ),
    ]


def moved_bytes(values: Any) -> int:
    """Bytes of all tensors in nested tuples."""
    if isinstance(values, torch.Tensor):
        return values.nbytes
    return sum(moved_bytes(value) for value in values) if isinstance(values, (tuple, list)) else 0


def measure(case: Case) -> dict[str, Any]:
    first = case.arguments()
    size = round((1 - case.unread) * moved_bytes(first)) + moved_bytes(case.fused(*first))
    sets = [first, *(case.arguments() for _ in range(math.ceil(ROTATE_BYTES / size)))]
    fused = graph_ms([lambda s=s: case.fused(*s) for s in sets])  # type: ignore[misc]
    row = {"bytes": size, "fused_ms": fused, "fused_gb_per_s": size / fused["median"] / 1e6}
    torch._dynamo.reset()
    compiled = torch.compile(case.unfused, fullgraph=True, dynamic=False)
    unfused = graph_ms([lambda s=s: compiled(*s) for s in sets])  # type: ignore[misc]
    return {**row, "unfused_ms": unfused, "speed_up": unfused["median"] / fused["median"]}


def line(row: dict[str, Any]) -> str:
    text = f"{row['kernel']:<31}"
    if "fused_ms" in row:
        fused, unfused = 1000 * row["fused_ms"]["median"], 1000 * row["unfused_ms"]["median"]
        text += f"  {fused:8.1f}  {row['fused_gb_per_s']:5.0f}  {unfused:10.1f}  {row['speed_up']:8.2f}"
    return text


def measurements(device: torch.device) -> list[series.Measurement]:
    return [series.Measurement({"kernel": case.name}, partial(measure, case)) for case in cases(device)]


def main() -> None:
    header = f"{'kernel':<31}  fused us   GB/s  unfused us  speed-up"
    series.main("kernels", __doc__, measurements, header, line)


if __name__ == "__main__":
    main()
