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


_HOPPER = "NVIDIA H100 Tensor Core GPU Architecture, V1.04, table 2"
_AMPERE = "NVIDIA A100 Tensor Core GPU Architecture, V1.0, table 1; A100 datasheet (80 GB: 2039 GB/s)"
PEAKS: dict[str, Peak] = {
    "NVIDIA H100 80GB HBM3": Peak(_tensor(989.4, 1978.9, 1978.9), 3352, _HOPPER),
    "NVIDIA H100 PCIe": Peak(_tensor(756.0, 1513.0, 1513.0), 2039, "NVIDIA H100 PCIe product brief; datasheet / 2"),
    "NVIDIA H200": Peak(_tensor(989.5, 1979.0, 1979.0), 4800, "NVIDIA H200 datasheet, H200 SXM, halved: no sparsity"),
    "NVIDIA A100-SXM4-80GB": Peak(_tensor(312.0, None, 624.0), 2039, _AMPERE),
    "NVIDIA A100-SXM4-40GB": Peak(_tensor(312.0, None, 624.0), 1555, _AMPERE),
    "NVIDIA L40S": Peak(_tensor(362.0, 733.0, 733.0), 864, "NVIDIA L40S datasheet, without sparsity"),
    "NVIDIA GeForce RTX 4090": Peak(
        _tensor(165.2, 330.3, 660.6), 1008, "NVIDIA Ada GPU Architecture, V2.02, appendix A, FP32 accumulate"
    ),
}
