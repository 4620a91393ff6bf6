"""What launching a CUDA graph takes, with memsets and without: `python -m benchmark.graph_launch --output FILE`.

The graphs are as long as a denoising step of FLUX.1 [dev] in float8: 876 kernels, between them 362 memsets of four
bytes; small kernels here, so that their gaps show. `utils/graph_memsets.py` says what is behind it.
"""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import torch

from utils.quiet import quiet

with quiet():
    from benchmark import series
    from benchmark.device_timing import Captured, captured
    from utils.errors import UserError
    from utils.graph_memsets import replace_memsets
    from utils.timing import summary

KERNELS, MEMSETS = 876, 362
_REPLAYS = 30
_KINDS = ("kernels in their place", "memsets", "memsets replaced")


def of_kind(kind: str, device: torch.device) -> tuple[Captured, torch.Tensor]:
    """A graph of the kind, and what its memsets write to: int32 [MEMSETS].

    Raises:
        UserError: the package cuda-bindings is missing.
    """
    try:
        from cuda.bindings import driver
    except ImportError:
        raise UserError("memsets are captured through the package cuda-bindings: pip install cuda-bindings") from None
    x, written = torch.ones(2**20, device=device), torch.ones(MEMSETS, dtype=torch.int32, device=device)

    def work() -> None:
        for i in range(KERNELS):
            x.mul_(1.0)
            at = i * MEMSETS // KERNELS
            if at == (i + 1) * MEMSETS // KERNELS:
                continue
            if kind == _KINDS[0]:
                written[at : at + 1].fill_(0)
            else:
                driver.cuMemsetD32Async(written.data_ptr() + 4 * at, 0, 1, torch.cuda.current_stream().cuda_stream)

    graph = captured([work], keep_graph=True)
    if kind == _KINDS[2]:
        replace_memsets(graph.graph, graph.stream)
    graph.graph.instantiate()
    return graph, written


def measure(kind: str, device: torch.device) -> dict[str, Any]:
    kept, written = of_kind(kind, device)
    graph = kept.graph
    written.fill_(1)
    graph.replay()
    torch.cuda.synchronize(device)
    if int(written.sum()) != 0:
        raise UserError("the graph didn't write what it captured")
    host, gpu = [], []
    for _ in range(_REPLAYS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        start.record()
        began = time.perf_counter()
        graph.replay()
        host.append(1e6 * (time.perf_counter() - began))
        end.record()
        end.synchronize()
        gpu.append(start.elapsed_time(end))
    return {"host_us": summary(host), "gpu_ms": summary(gpu)}


def line(row: dict[str, Any]) -> str:
    text = f"{row['graph']:<24}"
    if "host_us" in row:
        text += f"  {row['host_us']['median']:7.0f}  {row['gpu_ms']['median']:6.2f}"
    return text


def measurements(device: torch.device) -> list[series.Measurement]:
    return [series.Measurement({"graph": kind}, partial(measure, kind, device)) for kind in _KINDS]


def main() -> None:
    header = f"{'graph':<24}  host us  GPU ms"
    series.main("graphs", __doc__, measurements, header, line, {"kernels": KERNELS, "memsets": MEMSETS})


if __name__ == "__main__":
    main()
