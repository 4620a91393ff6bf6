"""Where the kernels' tests run: on the GPU, or, where TRITON_INTERPRET=1 was set before triton came, on the CPU."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """The kernels' device. The interpreter is made to round as the hardware does, and to count to an argument."""
    if not INTERPRETED:
        return torch.device("cuda")
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    monkeypatch.setattr(interpreter, "_convert_float", convert_float)
    patch_tensor = interpreter._patch_lang_tensor

    def patch(tensor: type, scope: Any) -> None:
        """Triton 3.6 turns an array of one value into an index, which numpy 2.4 no longer does."""
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patch)
    return torch.device("cpu")


def convert_float(values: np.ndarray, source: object, target: object, rounding: object) -> np.ndarray:
    """Triton 3.6's interpreter drops the carry when rounding a mantissa up to the next power of two; PyTorch doesn't.

    Takes and gives arrays of the types' bits, as the function that it stands in for.
    """
    types = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "fp8e4nv": torch.float8_e4m3fn}
    given = torch.frombuffer(bytearray(values.tobytes()), dtype=types[str(source)])
    bits = {8: torch.uint8, 16: torch.uint16, 32: torch.uint32}[target.primitive_bitwidth]  # type: ignore[attr-defined]
    return given.to(types[str(target)]).view(bits).numpy().reshape(values.shape)
