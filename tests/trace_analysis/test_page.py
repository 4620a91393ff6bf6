"""The HTML page: opened in a real browser, from disk, without a network; and what a hostile trace may put into it."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from trace_analysis.charts import visible
from trace_analysis.page import page

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="needs Chromium (on Debian: apt-get install chromium)")
HOSTILE = """<script>document.title = "run"</script><img src=x onerror='document.title="run"'>"""


def chromium(path: Path, *options: str) -> str:
    """Open the page in a headless browser with a profile of its own and no network to use; what it prints."""
    assert BROWSER is not None
    profile = path.parent / "profile"
    command = [
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars",
        f"--user-data-dir={profile}", "--proxy-server=127.0.0.1:9", "--window-size=1260,2400", *options, path.as_uri(),
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


@pytest.fixture
def several_steps(writer):
    """Ten steps with kernels of every kind, a wait and a gap."""
    names = ("nvjet_qqtst_a", "nvjet_tst_b", "flash_fwd_kernel", "elementwise_kernel", "amax_kernel", "CatArray", "x")
    for number in range(10):
        at = 1000 * number
        writer.step(at, 1000)
        writer.addmm(at + 5, 40, 4608, 3072, 3072)
        for i, name in enumerate(names):
            writer.kernel(name, at + 10 + 12 * i, at + 20 + 120 * i, 110 + number)
        writer.item(at + 870, 60)
    return writer


@needs_browser
def test_in_a_browser(several_steps, tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    path.write_text(page(several_steps.analyse()))
    shot = tmp_path / "page.png"
    chromium(path, f"--screenshot={shot}")
    pixels = np.asarray(Image.open(shot).convert("RGB")).reshape(-1, 3)
    assert len(pixels) == 1260 * 2400
    drawn = {tuple(colour) for colour in np.unique(pixels, axis=0).tolist()}
    # The bars of fp8 and bf16 GEMMs, attention, pointwise, casts and copies, and idle, in the page's colours.
    for colour in ("2a9d8f", "4269d0", "efb118", "ff725c", "f48fb1", "6b7a8f", "e3e6eb"):
        assert tuple(bytes.fromhex(colour)) in drawn, colour
    white = (pixels == 255).all(axis=1).mean()
    assert 0.5 < white < 0.98


@needs_browser
def test_what_the_browser_makes_of_it(several_steps, tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    path.write_text(page(several_steps.analyse()))
    tree = chromium(path, "--dump-dom")
    headings = re.findall(r"<h2>(.*?)</h2>", tree)
    assert headings[:2] == ["One denoising step", "Every step"]
    assert {"Why the GPU was idle, in the denoising steps", "Synchronisations inside the loop"} <= set(headings)
    assert "Achieved rates, in the denoising steps" in headings
    assert tree.count("<svg") == 3
    assert tree.count(">denoising_step") >= 20
    assert "aten::item &gt; aten::_local_scalar_dense" in tree


@needs_browser
def test_a_script_in_a_name_does_not_run(several_steps, tmp_path: Path) -> None:
    several_steps.kernel(HOSTILE, 500, 9_900, 400)
    several_steps.step(9_990, 5, HOSTILE)
    several_steps.addmm(9_950, 5, 8, 8, 8, dtype=HOSTILE)
    analysis = several_steps.analyse()
    path = tmp_path / "page.html"
    # Neither the escaping nor the policy may hold alone: each is tested without the other.
    text = page(analysis)
    bare = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text)
    assert bare != text
    for content in (text, bare):
        path.write_text(content)
        tree = chromium(path, "--dump-dom")
        assert "<title>trace.json</title>" in tree
        assert "<script" not in tree
        assert "<img" not in tree
        assert "&lt;script&gt;" in tree
    path.write_text(text.replace("<h1>", f"{HOSTILE}<h1>"))
    assert "<title>trace.json</title>" in chromium(path, "--dump-dom"), "the policy stops what is not escaped"
    path.write_text(bare.replace("<h1>", f"{HOSTILE}<h1>"))
    assert "<title>run</title>" in chromium(path, "--dump-dom"), "else this test could not fail"


def test_nothing_is_fetched_and_nothing_hostile_is_markup(several_steps) -> None:
    several_steps.kernel(HOSTILE, 500, 9_900, 400)
    several_steps.properties["deviceProperties"] = [{"id": 0, "name": HOSTILE}]
    text = page(several_steps.analyse(marker="denoising_step"))
    assert not re.search(r"<(script|img|link|iframe|object)|\b(src|href)=|url\(|@import", text.replace("src=x", ""))
    assert "http" not in re.sub(r"http-equiv", "", text)
    assert "&lt;script&gt;" in text


def test_without_a_gpu_or_what_can_be_trusted(writer, two_steps) -> None:
    assert page(two_steps.analyse()).count("<svg") == 3
    two_steps.call("cudaGraphLaunch", 150, 5)
    blank = page(two_steps.analyse())
    assert blank.count("<svg") == 0
    assert blank.count("n/a: there is no step with work on a GPU that can be trusted.") == 2
    assert "left blank: 1 of 1 CUDA graph launches have no kernels" in blank
    two_steps.events = [event for event in two_steps.events if event["cat"] == "user_annotation"]
    text = page(two_steps.analyse())
    assert text.count("n/a: the trace has no GPU in it.") == 2
    assert "There is no GPU in this trace. " in text
    assert "window ms" not in text
    assert "window ms" in blank


def test_visible_intervals() -> None:
    start = np.array([0, 500_000, 500_001, 900_000])
    end = np.array([250_000, 500_001, 500_900, 1_000_000])
    parts = visible(start, end, 0, 1_000_000)
    assert [number for _, _, number in parts] == [0, 2, 3], "of two in one half pixel the longer one"
    assert parts[0][0] == 0
    assert parts[0][1] == pytest.approx(0.25, abs=1e-3)
    assert parts[2][0] + parts[2][1] == pytest.approx(1)
