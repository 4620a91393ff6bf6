"""The kernels' tests on the CPU: in a process of their own, since Triton's import decides."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys

import pytest
import torch

from utils.files import ROOT

TESTS = ("test_kernels.py", "test_fused_blocks.py", "test_fused_group_norm.py", "test_benchmark_cases.py")


# Found by name: it came with no version's announcement.
SUPPORTED = hasattr(torch._library.triton, "_is_interpreted_triton_kernel")


@pytest.mark.slow
@pytest.mark.skipif(not SUPPORTED, reason="this PyTorch's wrap_triton takes no kernel in Triton's interpreter")
@pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="needs the package triton, which isn't installed")
@pytest.mark.skipif(torch.cuda.is_available(), reason="the same tests run on the GPU")
@pytest.mark.parametrize("name", TESTS)
def test_kernels_in_the_interpreter(name: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"tests/recipes/kernels/{name}"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert re.search(r"[1-9]\d* passed", done.stdout), done.stdout
