"""benchmark.kernels compares like with like: fused and unfused form give the same, at a small size."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch

pytest.importorskip("triton", reason="needs the package triton, which isn't installed")

from benchmark import kernels

pytestmark = [] if os.environ.get("TRITON_INTERPRET") == "1" else [pytest.mark.gpu]


def tensors(out: torch.Tensor | tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return out if isinstance(out, tuple) else (out,)


def test_both_forms_agree(device: torch.device, monkeypatch: pytest.MonkeyPatch, error_of: Callable) -> None:
    for name, size in {"TEXT": 3, "IMAGE": 13, "DIM": 64, "HEADS": 2, "HEAD_DIM": 128, "SIDE": 12}.items():
        monkeypatch.setattr(kernels, name, size)
    cases = kernels.cases(device)
    for case in cases:
        arguments = case.arguments()
        fused, unfused = (tensors(form(*arguments)) for form in (case.fused, case.unfused))
        layouts = [[(x.dtype, x.numel()) for x in out] for out in (fused, unfused)]
        assert layouts[0] == layouts[1], case.name
        if case.name.startswith("qkv_norm_rotary_float8"):
            continue  # the unfused form scales query and key by their true maximum, the fused one by its bound
        for one, other in zip(fused, unfused, strict=True):
            if one.numel() == 0:
                continue  # lengths that weren't asked for
            assert error_of(one.float(), other.float()) < 0.02, case.name
