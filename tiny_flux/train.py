"""Train the embedded model from scratch: `python -m tiny_flux.train --out assets/tiny-flux`.

Six stages, each resumed where it was stopped when the command is given again with the same --work folder:

1. `autoencoder`: AutoencoderKL on rendered scenes, L1 + KL; then `decoder`, its decoder alone, L1, small objects above
   all.
2. `encode`: the pool's latents (their mean), and the VAE's scaling and shift factors from them.
3. `flow`: transformer and both text encoders together, rectified flow as FLUX's: x_t = (1 - t) x_0 + t noise,
   the model predicts noise - x_0 (arXiv 2209.03003, 2403.03206), t mostly logit-normal. Beside it the transformer
   learns to tell what lies where (`layout`), and the text encoders what a caption claims (`claims`).
4. `guidance`: classifier-free guidance (arXiv 2207.12598; one caption in ten is trained on as empty) distilled into the
   model (arXiv 2210.03142), as into FLUX.1 [dev], so that one evaluation a step suffices.
5. `reflow`: rectified flow on pairs (noise, image) that the model itself made from noise with many steps, where the
   checker finds the image right. It straightens the model's paths, so that few steps suffice (arXiv 2209.03003,
   section 2.2).
6. `reward`: fine-tuning on what the checker says of the model's own images, in few steps and in many (DiffusionNFT,
   arXiv 2509.16117).

Of what the last two changed, `--fine-tuning-share` is kept: weights between those before and after hold to what was
known and to what was learned (arXiv 2109.01903).

`--init CHECKPOINT` starts from a trained pipeline instead of random weights; with `--vae-steps 0` its autoencoder is
kept.

The weights saved are an exponential moving average, in bfloat16. Written for one GPU (most of an hour on
an H200) or several of one machine (`tiny_flux.ranks`); runs on a CPU too, as the tests do with `--preset smoke`.
"""

from __future__ import annotations

import argparse
import copy
import csv
import itertools
import json
import math
import shutil
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch

from utils.quiet import quiet

with quiet():
    from diffusers import FluxPipeline

    from tiny_flux import ranks
    from tiny_flux.autoencoder import encode_pool, train_autoencoder, train_decoder
    from tiny_flux.data import corpus, make_pool
    from tiny_flux.flow import train_flow
    from tiny_flux.guidance import distil_guidance
    from tiny_flux.model import new_pipeline, new_scheduler
    from tiny_flux.reflow import train_reflow
    from tiny_flux.reward import train_reward
    from tiny_flux.settings import PRESETS, Settings
    from tiny_flux.tokenizers import clip_tokenizer, t5_tokenizer
    from utils import checkpoints
    from utils.errors import UsageError, UserError, run_command
    from utils.files import write_text

# What a stage logs, its label and scale.
PLOTTED = (
    ("right", "share of right images", "linear"),
    ("velocity", "velocity's error", "log"),
    ("loss", "loss", "log"),
)


def save_pipeline(pipe: FluxPipeline, out: Path) -> None:
    """A bfloat16 copy of `pipe`, in diffusers format, by the first process."""
    if not ranks.is_first():
        return
    names = ("vae", "transformer", "text_encoder", "text_encoder_2")
    copies = {name: copy.deepcopy(getattr(pipe, name)).to("cpu", torch.bfloat16) for name in names}
    part, old = (out.with_name(f"{out.name}.{suffix}") for suffix in ("part", "old"))
    for folder in (part, old):
        shutil.rmtree(folder, ignore_errors=True)
    FluxPipeline(**{**pipe.components, **copies}).save_pretrained(part, max_shard_size="14MB")
    for name in ("vae", "transformer"):  # diffusers notes the folder that `--init` was
        path = part / name / "config.json"
        config = json.loads(path.read_text())
        config.pop("_name_or_path", None)
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    if out.exists():
        out.rename(old)
    part.rename(out)
    shutil.rmtree(old, ignore_errors=True)


def plot_losses(work: Path) -> None:
    """`losses.png` from `losses.csv`: one panel a stage, with the first of PLOTTED that it logs."""
    if not ranks.is_first() or not (work / "losses.csv").exists():
        return
    with (work / "losses.csv").open() as file:
        rows = list(csv.DictReader(file))
    if not rows:
        return
    stages = list(dict.fromkeys(row["stage"] for row in rows))
    across = min(3, len(stages))
    down = math.ceil(len(stages) / across)
    figure, panels = plt.subplots(down, across, figsize=(4 * across, 3 * down), squeeze=False, layout="constrained")
    for panel, stage in itertools.zip_longest(panels.flat, stages):
        if stage is None:
            panel.axis("off")
            continue
        of_stage = [row for row in rows if row["stage"] == stage]
        logged = {row["name"] for row in of_stage}
        name, label, scale = next(plotted for plotted in PLOTTED if plotted[0] in logged)
        points = [(int(row["step"]), float(row["value"])) for row in of_stage if row["name"] == name]
        panel.plot(*zip(*points, strict=True), linewidth=1)
        panel.set(title=stage, xlabel="step", ylabel=label, yscale=scale)
        panel.grid(alpha=0.3, which="both")
    figure.savefig(work / "losses.png", dpi=120)
    plt.close(figure)


def fresh_pipeline(seed: int) -> FluxPipeline:
    sentences = corpus(seed)
    return new_pipeline(clip_tokenizer(sentences), t5_tokenizer(sentences), seed)


def train(
    settings: Settings,
    work: Path,
    out: Path,
    device: torch.device,
    init: str | None = None,
    stop_after: str | None = None,
) -> None:
    """All stages, or those up to `stop_after`, into `work`: a pipeline after each, losses and settings; at last `out`.

    Raises:
        UsageError: settings that don't go together, or an `init` that is no checkpoint.
        UserError: `work` holds a run on other data.
    """
    if settings.reward_steps and settings.save_every % settings.reward_updates:
        raise UsageError(
            f"--save-every {settings.save_every}: give a multiple of --reward-updates {settings.reward_updates}, "
            "so that a resumed run draws where this one does"
        )
    work.mkdir(parents=True, exist_ok=True)
    _check_data(settings, work)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cuda.enable_cudnn_sdp(False)  # FlashAttention's backward: cuDNN's is a suspect in a crash seen
    pipe = checkpoints.load(init, torch.float32, device, progress=False) if init else fresh_pipeline(settings.seed)
    pipe.scheduler = new_scheduler()
    pipe.to(device)
    seed = ranks.own_seed(settings.seed)
    pool = make_pool(settings.pool, settings.captions, seed, pipe.tokenizer, pipe.tokenizer_2).to(device)
    pool.of_categories(settings.reward_categories)  # refused now rather than after hours
    if settings.vae_steps:
        train_autoencoder(pipe, pool, settings, work, device)
    train_decoder(pipe.vae, pool, settings, work, device)
    latents = torch.empty(0, 256, 64, device=device)
    if settings.vae_steps or settings.flow_steps or settings.guidance_steps:  # nothing else reads them
        latents = encode_pool(pipe, pool, settings, work, device)
    if stop_after == "encode":
        return
    machine = {"processes": ranks.count(), "torch": torch.__version__, "device": device_name(device)}
    if ranks.is_first():
        write_text(work / "training.json", json.dumps({"settings": asdict(settings), **machine}, indent=1) + "\n")
    velocity = train_flow(pipe, pool, latents, settings, work, device)
    save_pipeline(pipe, work / "after-flow")
    plot_losses(work)
    if stop_after == "flow":
        return
    distil_guidance(velocity, pool, latents, settings, work, device)
    save_pipeline(pipe, work / "after-guidance")
    plot_losses(work)
    if stop_after == "guidance":
        return
    before = [parameter.detach().clone() for parameter in velocity.parameters()]
    train_reflow(velocity, pipe.vae, pool, settings, work, device)
    save_pipeline(pipe, work / "after-reflow")
    plot_losses(work)
    if stop_after == "reflow":
        return
    train_reward(velocity, pipe.vae, pool, settings, work, device)
    with torch.no_grad():
        for parameter, old in zip(velocity.parameters(), before, strict=True):
            parameter.lerp_(old, 1 - settings.fine_tuning_share)
    save_pipeline(pipe, out)
    plot_losses(work)


def _check_data(settings: Settings, work: Path) -> None:
    """Refuse to go on with latents and pairs that belong to other scenes."""
    path, data = work / "data.json", {name: getattr(settings, name) for name in ("seed", "pool", "captions")}
    if not path.exists():
        if ranks.is_first():
            write_text(path, json.dumps(data) + "\n")
    elif (known := json.loads(path.read_text())) != data:
        raise UserError(f"{work} holds a run with {known}, not {data}: give another folder with --work")


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the trained pipeline")
    parser.add_argument("--work", type=Path, default=Path("work/tiny-flux"), help="checkpoints; resumed from if there")
    parser.add_argument("--init", help="trained checkpoint to start from: a folder, or tiny")
    parser.add_argument("--preset", choices=PRESETS, default="full")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--stop-after",
        choices=["encode", "flow", "guidance", "reflow"],
        help="the rest goes on when the command is given without it",
    )
    for field in fields(Settings):
        of, several = str(field.type).removeprefix("tuple[").removesuffix(", ...]"), "tuple" in str(field.type)
        parser.add_argument(
            f"--{field.name.replace('_', '-')}", type={"int": int, "float": float, "str": str}[of],
            nargs="+" if several else None,
        )  # fmt: skip
    arguments = parser.parse_args()
    given = {name: value for name, value in vars(arguments).items() if value is not None}
    chosen: dict[str, Any] = {f.name: given[f.name] for f in fields(Settings) if f.name in given}
    lists = {name: tuple(value) for name, value in chosen.items() if isinstance(value, list)}
    settings = replace(PRESETS[arguments.preset], **{**chosen, **lists})
    device = ranks.join(arguments.device)
    try:
        train(settings, arguments.work, arguments.out, device, arguments.init, arguments.stop_after)
    finally:
        ranks.leave()


if __name__ == "__main__":
    run_command(main, debug=False)
