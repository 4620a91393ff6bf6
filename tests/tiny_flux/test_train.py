"""The training command, in small on the CPU: killed and resumed it makes the very weights of an undisturbed run."""

from __future__ import annotations

import csv
import itertools
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline
from PIL import Image

from utils.files import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def command(folder: Path, *more: str) -> list[str]:
    where = ["--work", str(folder / "work"), "--out", str(folder / "out")]
    return [sys.executable, "-m", "tiny_flux.train", "--preset", "smoke", "--device", "cpu", *where, *more]


def train(folder: Path, *more: str) -> None:
    ended = subprocess.run(command(folder, *more), cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


def train_until_killed(folder: Path, seen: str) -> None:
    """SIGKILL as soon as the file `seen` is in the work folder."""
    with subprocess.Popen(command(folder), cwd=ROOT, stderr=subprocess.DEVNULL) as process:
        while not (folder / "work" / seen).exists():
            assert process.poll() is None, "it ended before it could be killed"
            time.sleep(0.01)
        process.kill()
    assert process.returncode == -signal.SIGKILL


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    train(folder)
    return folder


def test_killed_and_resumed_it_makes_the_same_weights(undisturbed: Path, tmp_path: Path) -> None:
    train_until_killed(tmp_path, "autoencoder.pt")  # saved in the middle of its stage, too
    state = torch.load(tmp_path / "work" / "autoencoder.pt", weights_only=True)
    assert 0 < state["step"] <= 4
    train(tmp_path, "--stop-after", "encode")
    assert (tmp_path / "work" / "latents.pt").exists()
    assert not (tmp_path / "work" / "flow.pt").exists()
    train_until_killed(tmp_path, "flow.pt")
    train_until_killed(tmp_path, "reward.pt")
    assert not (tmp_path / "out").exists()
    train(tmp_path)
    for part in ("out", "work/after-flow", "work/after-guidance", "work/after-reflow"):
        wanted, found = contents(undisturbed / part), contents(tmp_path / part)
        assert found.keys() == wanted.keys()
        assert [name for name in wanted if found[name] != wanted[name]] == []
    logged = [(folder / "work" / "losses.csv").read_text().splitlines() for folder in (undisturbed, tmp_path)]
    steps = [[line.rpartition(",")[0] for line in lines] for lines in logged]
    assert steps[0] == steps[1], "each step once"


def test_share_of_what_fine_tuning_changed(undisturbed: Path, tmp_path: Path) -> None:
    """None of it leaves the weights as they were before `reflow`; most of it moved them."""
    before, after = (contents(undisturbed / folder) for folder in ("work/after-guidance", "out"))
    assert before != after
    train(tmp_path, "--fine-tuning-share", "0")
    assert contents(tmp_path / "out") == before


def test_starts_from_a_trained_pipeline(tmp_path: Path) -> None:
    """With nothing to train, what comes out is what went in."""
    stages = ("vae", "decoder", "flow", "guidance", "reward", "reflow")
    train(tmp_path, "--init", "tiny", *itertools.chain(*((f"--{stage}-steps", "0") for stage in stages)))
    weights = [
        {name: data for name, data in contents(folder).items() if name.endswith(".safetensors")}
        for folder in (ROOT / "assets" / "tiny-flux", tmp_path / "out")
    ]
    assert {name.split("/")[0] for name in weights[0]} == {"text_encoder", "text_encoder_2", "transformer", "vae"}
    assert weights[0] == weights[1]


def test_other_data_is_refused(undisturbed: Path) -> None:
    ended = subprocess.run(command(undisturbed, "--seed", "1"), cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 1
    assert "give another folder with --work" in ended.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--save-every", "3"), "--save-every 3: give a multiple of --reward-updates 2"),
        (("--reward-categories", "blobs"), "there is no category 'blobs'"),
        (("--init", "nowhere"), "unknown checkpoint 'nowhere'"),
    ],
)
def test_refused_before_training(tmp_path: Path, options: tuple[str, ...], message: str) -> None:
    ended = subprocess.run(command(tmp_path, *options), cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 2
    assert message in ended.stderr.splitlines()[-1]
    assert not list((tmp_path / "work").glob("*.pt"))


def test_later_stages_change_the_transformer_and_not_the_autoencoder(undisturbed: Path) -> None:
    work = undisturbed / "work"
    folders = (work / "after-flow", work / "after-guidance", work / "after-reflow", undisturbed / "out")
    for before, after in itertools.pairwise(map(contents, folders)):
        changed = {name.split("/")[0] for name in after if after[name] != before[name]}
        assert changed == {"transformer", "text_encoder", "text_encoder_2"}


def test_the_pipeline_loads_and_draws(undisturbed: Path) -> None:
    pipe = FluxPipeline.from_pretrained(undisturbed / "out", dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    weights = [
        p for part in (pipe.transformer, pipe.vae, pipe.text_encoder, pipe.text_encoder_2) for p in part.parameters()
    ]
    assert all(p.isfinite().all() for p in weights)
    assert sum(p.numel() for p in weights) * 2 < 32e6, "more than 32 MB in bfloat16"
    assert pipe.vae.config.scaling_factor != 1
    size = {"height": 64, "width": 64, "num_inference_steps": 2}
    image = pipe("a red circle", guidance_scale=0.0, max_sequence_length=64, **size).images[0]
    assert isinstance(image, Image.Image)
    assert image.size == (64, 64)


def test_losses_and_settings_are_kept(undisturbed: Path) -> None:
    with (undisturbed / "work" / "losses.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["stage"], row["step"]) for row in rows if row["name"] == "loss"] == [
        ("autoencoder", "4"),
        ("decoder", "2"),
        ("flow", "4"),
        ("guidance", "2"),
        ("reflow", "2"),
        ("reward", "4"),
    ]
    assert all(float(row["value"]) >= 0 for row in rows)
    with Image.open(undisturbed / "work" / "losses.png") as picture:
        assert picture.width > 600
    kept = json.loads((undisturbed / "work" / "training.json").read_text())
    assert kept["settings"]["flow_steps"] == 4
    assert kept["device"] == "cpu"


def test_given_again_after_the_end_it_trains_nothing_more(undisturbed: Path) -> None:
    before = contents(undisturbed / "out")
    train(undisturbed)
    assert contents(undisturbed / "out") == before
