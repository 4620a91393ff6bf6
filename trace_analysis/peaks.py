"""What GPUs can do at most: dense TFLOP/s by dtype, and memory bandwidth. One not in the table has no peak.

By the exact name that CUDA gives the device: a share of a GPU (MIG) or another form of it is another entry.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Peak:
    """tflops: tensor cores, without sparsity, accumulating in float32; GB/s of the GPU's memory; where it is said."""

    tflops: dict[str, float]
    gbps: float
    source: str


def _tensor(half: float, fp8: float | None, int8: float) -> dict[str, float]:
    return {"bf16": half, "fp16": half, "int8": int8, **({} if fp8 is None else {"fp8": fp8})}


_HOPPER = "NVIDIA H100 Tensor Core GPU Architecture (white paper), H100 SXM5"
_AMPERE = "NVIDIA A100 datasheet, A100 SXM, without sparsity"
PEAKS: dict[str, Peak] = {
    "NVIDIA H100 80GB HBM3": Peak(_tensor(989.4, 1978.9, 1978.9), 3352, _HOPPER),
    "NVIDIA H100 PCIe": Peak(
        _tensor(756.0, 1513.0, 1513.0), 2000, "NVIDIA H100 datasheet, H100 PCIe, halved: no sparsity"
    ),
    "NVIDIA H200": Peak(_tensor(989.5, 1979.0, 1979.0), 4800, "NVIDIA H200 datasheet, H200 SXM, halved: no sparsity"),
    "NVIDIA A100-SXM4-80GB": Peak(_tensor(312.0, None, 624.0), 2039, _AMPERE),
    "NVIDIA A100-SXM4-40GB": Peak(_tensor(312.0, None, 624.0), 1555, _AMPERE),
    "NVIDIA L40S": Peak(_tensor(362.0, 733.0, 733.0), 864, "NVIDIA L40S datasheet, without sparsity"),
}
