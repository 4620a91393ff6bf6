"""Two processes, as `torchrun` starts them, on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline

from utils.files import ROOT

TWO = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
CHECK = """
import sys
from pathlib import Path
import torch
from tiny_flux import ranks

device = ranks.join("cpu")
rank = ranks.rank()
first, second, unused = (torch.nn.Parameter(torch.full((2, 3), 1.0 + rank)) for _ in range(3))
ranks.share([first])
(first * (1 + rank) + second * 10 * rank).sum().backward()
ranks.average_gradients([first, second, unused])
shared = ranks.from_first(1.5 + rank, 2.5, device=device)
folder = ranks.own_folder(Path(sys.argv[1]))
grads = [first.grad.tolist(), second.grad.tolist(), unused.grad]
seen = [first.tolist(), *grads, shared, ranks.own_seed(7), ranks.count()]
(folder / "seen").write_text(repr(seen))
ranks.leave()
"""


def test_two_processes_agree(tmp_path: Path) -> None:
    script = tmp_path / "check.py"
    script.write_text(CHECK)
    subprocess.run([*TWO, str(script), str(tmp_path / "work")], cwd=ROOT, env=environment(), check=True, timeout=120)
    for rank, folder in enumerate((tmp_path / "work", tmp_path / "work" / "rank-1")):
        weight, gradient, other, unused, shared, seed, count = eval((folder / "seen").read_text())
        assert weight == [[1.0] * 3] * 2, "the first one's"
        assert (gradient, other, unused) == ([[1.5] * 3] * 2, [[5.0] * 3] * 2, None)
        assert (shared, count) == ((1.5, 2.5), 2)
        assert (seed == 7) == (rank == 0)


@pytest.mark.slow
def test_two_processes_train_one_model(tmp_path: Path) -> None:
    """Each on scenes of its own; resumed after the scenes were encoded."""
    work, out = tmp_path / "work", tmp_path / "out"
    command = [*TWO, "-m", "tiny_flux.train", "--preset", "smoke", "--device", "cpu", "--work", str(work)]
    for more in (["--stop-after", "encode"], []):
        subprocess.run([*command, "--out", str(out), *more], cwd=ROOT, env=environment(), check=True, timeout=600)
    FluxPipeline.from_pretrained(out)
    own, others = (torch.load(f / "latents.pt", weights_only=True) for f in (work, work / "rank-1"))
    assert (own["shift"], own["scale"]) == (others["shift"], others["scale"])
    assert not torch.equal(own["latents"], others["latents"])
    assert json.loads((work / "training.json").read_text())["processes"] == 2
    assert sorted(path.name for path in (work / "rank-1").iterdir()) == ["latents.pt", "pairs.pt"]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
