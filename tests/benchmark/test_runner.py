"""What is kept of a measurement."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from benchmark.job import Job
from benchmark.runner import Runner
from recipes import Recipe
from utils.request import Request


@pytest.mark.parametrize(("checkpoint", "side"), [("tiny", 256), ("random/flux-dev", 96)])
def test_image_is_kept_small_and_noise_smaller(tmp_path: Path, checkpoint: str, side: int) -> None:
    request = Request("a cat", 512, 256, 1, 0.0, 64)
    job = Job(checkpoint, "cpu", Recipe(), "", None, request, 1, None, True, Path(), Path())
    drawn = tmp_path / "drawn.png"
    Image.new("RGB", (256, 512)).save(drawn)
    result = {"checkpoint": checkpoint, "schema": 1}
    assert Runner(job, tmp_path / "kept")._keep("bf16", result, drawn) is result
    (kept,) = (tmp_path / "kept").glob("*.png")
    with Image.open(kept) as image:
        assert image.size == (side // 2, side)
    assert kept.with_suffix(".json").exists()
