"""Train the embedded model from scratch: `python -m tiny_flux.train --out assets/tiny-flux`.

Four stages, each resumed where it was stopped when the command is given again with the same --work folder:

1. `autoencoder`: AutoencoderKL on rendered scenes, L1 + KL.
2. `encode`: the pool's latents (their mean), and the VAE's scaling and shift factors from them.
3. `flow`: transformer and both text encoders together, rectified flow as FLUX's: x_t = (1 - t) x_0 + t noise,
   the model predicts noise - x_0 (arXiv 2209.03003, 2403.03206), t mostly logit-normal.
4. `reflow`: the same on pairs (noise, image) that the model itself made from noise with many steps and
   classifier-free guidance (arXiv 2207.12598; one caption in ten is trained on as empty). It straightens the model's
   paths, so that few steps suffice (arXiv 2209.03003, section 2.2), and distils the guidance into it (arXiv
   2210.03142), as FLUX.1's own training does, so that one evaluation a step suffices.

`--init FOLDER` starts from a trained pipeline instead of random weights; with `--vae-steps 0` its autoencoder is kept.

The weights saved are an exponential moving average, in bfloat16. Written for one GPU (about 25 minutes on an H100);
runs on a CPU too, as the tests do with `--preset smoke`.
"""

from __future__ import annotations

import argparse
import copy
import csv
import hashlib
import itertools
import json
import math
import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from diffusers import FluxPipeline
from torch import nn
from tqdm import tqdm

from tiny_flux.data import Pool, corpus, make_pool
from tiny_flux.model import SHIFT, new_pipeline, new_scheduler
from tiny_flux.tokenizers import clip_tokenizer, t5_tokenizer
from utils.errors import run_command


@dataclass(frozen=True)
class Settings:
    pool: int = 120_000
    captions: int = 3
    vae_steps: int = 3000
    vae_batch: int = 32
    vae_lr: float = 5e-4
    kl_weight: float = 2e-4
    flow_steps: int = 24_000
    flow_batch: int = 256
    flow_lr: float = 8e-4
    reflow_pairs: int = 40_000
    reflow_sampling_steps: int = 28
    guidance: float = 3.0
    empty_captions: float = 0.1
    reflow_steps: int = 3000
    reflow_lr: float = 3e-4
    ema: float = 0.9995
    save_every: int = 1000
    compile: int = 1
    seed: int = 0


PRESETS = {
    "full": Settings(),
    "smoke": Settings(
        pool=64, captions=2, vae_steps=4, vae_batch=4, flow_steps=4, flow_batch=4, reflow_pairs=8,
        reflow_sampling_steps=2, reflow_steps=2, save_every=2, compile=0,
    ),
}  # fmt: skip


class Stage:
    """A resumable loop over optimizer steps: AdamW, warm-up and cosine decay, EMA, loss log, checkpoints.

    Step `s` of a stage draws its randomness from a generator seeded by (seed, stage, s), so that a resumed run
    makes the very steps that an uninterrupted one makes.
    """

    def __init__(
        self, name: str, module: nn.Module, steps: int, lr: float, settings: Settings, work: Path, device: torch.device
    ):
        self.name, self.module, self.steps, self.lr = name, module, steps, lr
        self.settings, self.device, self.work = settings, device, work
        self.path = work / f"{name}.pt"
        decay = [p for p in module.parameters() if p.ndim >= 2]
        other = [p for p in module.parameters() if p.ndim < 2]
        self.optimizer = torch.optim.AdamW(
            [{"params": decay, "weight_decay": 0.01}, {"params": other, "weight_decay": 0.0}],
            lr=lr,
            betas=(0.9, 0.99),
            fused=device.type == "cuda",
        )
        self.parameters = [*decay, *other]
        self.ema = [p.detach().clone() for p in self.parameters]
        self.step = 0
        if self.path.exists():
            state = torch.load(self.path, map_location=device, weights_only=True)
            module.load_state_dict(state["module"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.ema, self.step = state["ema"], state["step"]

    def run(self, loss: Callable[[torch.Generator], dict[str, torch.Tensor]]) -> None:
        """Train to the end; `loss(generator)` returns the loss under "loss" and what else to log."""
        self.module.train()
        seen: list[dict[str, torch.Tensor]] = []
        progress = tqdm(total=self.steps, initial=self.step, desc=self.name, mininterval=2)
        while self.step < self.steps:
            for group in self.optimizer.param_groups:
                group["lr"] = self.lr * self._schedule()
            losses = loss(generator(self.device, self.settings.seed, self.name, self.step))
            losses["loss"].backward()
            nn.utils.clip_grad_norm_(self.parameters, 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            decay = min(self.settings.ema, (self.step + 1) / (self.step + 10))
            torch._foreach_lerp_(self.ema, [p.detach() for p in self.parameters], 1 - decay)
            seen.append({key: value.detach() for key, value in losses.items()})
            self.step += 1
            progress.update()
            if len(seen) == 50 or self.step == self.steps:
                mean = {key: torch.stack([s[key] for s in seen]).mean().item() for key in seen[0]}
                self._log(mean)
                progress.set_postfix({key: f"{value:.4f}" for key, value in mean.items()})
                seen = []
            if self.step % self.settings.save_every == 0 or self.step == self.steps:
                self._save()
        progress.close()
        self.use_ema()

    def use_ema(self) -> None:
        """Put the averaged weights into the module, for good: a stage ends with this."""
        with torch.no_grad():
            for parameter, average in zip(self.parameters, self.ema, strict=True):
                parameter.copy_(average)
        self.module.eval()

    def _schedule(self) -> float:
        warmup = min(500, self.steps // 10 + 1)
        if self.step < warmup:
            return (self.step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (self.step - warmup) / max(1, self.steps - warmup))) + 1e-3

    def _save(self) -> None:
        state = {"module": self.module.state_dict(), "optimizer": self.optimizer.state_dict(), "ema": self.ema}
        save_atomically({**state, "step": self.step}, self.path)

    def _log(self, losses: dict[str, float]) -> None:
        path = self.work / "losses.csv"
        new = not path.exists()
        with path.open("a", newline="") as file:
            writer = csv.writer(file)
            if new:
                writer.writerow(["stage", "step", "name", "value"])
            writer.writerows([self.name, self.step, key, f"{value:.6g}"] for key, value in losses.items())


def generator(device: torch.device, *key: object) -> torch.Generator:
    """A generator seeded by `key`, the same on every run and machine of a kind."""
    seed = int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:7], "big")
    return torch.Generator(device).manual_seed(seed)


def save_atomically(value: object, path: Path) -> None:
    temporary = path.with_name(path.name + ".part")
    torch.save(value, temporary)
    os.replace(temporary, path)


def autocast(device: torch.device) -> torch.autocast | nullcontext:
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()


def train_autoencoder(pipe: FluxPipeline, pool: Pool, settings: Settings, work: Path, device: torch.device) -> None:
    vae = pipe.vae
    stage = Stage("autoencoder", vae, settings.vae_steps, settings.vae_lr, settings, work, device)
    vae.to(memory_format=torch.channels_last)

    def reconstruct(images: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean, logvar = vae.encoder(images).chunk(2, dim=1)
        logvar = logvar.float().clamp(-20, 10)
        mean = mean.float()
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        return vae.decoder(mean + (0.5 * logvar).exp() * noise), kl

    step = torch.compile(reconstruct) if settings.compile else reconstruct

    def loss(random: torch.Generator) -> dict[str, torch.Tensor]:
        index = torch.randint(len(pool), (settings.vae_batch,), generator=random, device=device)
        images = pool.images(index).contiguous(memory_format=torch.channels_last)
        noise = torch.randn(settings.vae_batch, 16, 32, 32, generator=random, device=device)
        with autocast(device):
            output, kl = step(images, noise)
        error = (output.float() - images).abs().mean()
        return {"loss": error + settings.kl_weight * kl, "l1": error, "kl": kl}

    stage.run(loss)


@torch.no_grad()
def encode_pool(pipe: FluxPipeline, pool: Pool, work: Path, device: torch.device) -> torch.Tensor:
    """Packed latents of the whole pool, bfloat16 [n, 256, 64], scaled to mean 0 and deviation 1."""
    path = work / "latents.pt"
    if path.exists():
        state = torch.load(path, map_location=device, weights_only=True)
    else:
        batches = torch.arange(len(pool), device=device).split(256)
        latents = torch.empty(len(pool), 16, 32, 32, dtype=torch.bfloat16, device=device)
        for index in tqdm(batches, desc="encode", mininterval=2):
            images = pool.images(index).contiguous(memory_format=torch.channels_last)
            with autocast(device):
                latents[index] = pipe.vae.encode(images).latent_dist.mean.to(latents.dtype)
        sample = latents[: 2**14].float()
        state = {"latents": latents, "shift": sample.mean().item(), "scale": 1 / sample.std().item()}
        save_atomically(state, path)
    pipe.vae.register_to_config(scaling_factor=state["scale"], shift_factor=state["shift"])
    latents = state["latents"]
    for start in range(0, len(latents), 2**14):  # in pieces: float32 of all of it would not fit
        piece = latents[start : start + 2**14]
        piece.copy_((piece.float() - state["shift"]) * state["scale"])
    return torch.cat([FluxPipeline._pack_latents(p, len(p), 16, 32, 32) for p in latents.split(2**14)])


class Velocity(nn.Module):
    """Text encoders and transformer as one function: (latents, t, token ids) -> predicted noise - x_0."""

    def __init__(self, pipe: FluxPipeline):
        super().__init__()
        self.transformer, self.clip, self.t5 = pipe.transformer, pipe.text_encoder, pipe.text_encoder_2
        self.register_buffer("image_ids", pipe._prepare_latent_image_ids(1, 16, 16, "cpu", torch.float32), False)

    def forward(
        self, latents: torch.Tensor, time: torch.Tensor, t5_ids: torch.Tensor, clip_ids: torch.Tensor
    ) -> torch.Tensor:
        """latents [b, 256, 64], time [b] in 0..1, token ids [b, 64] and [b, 77]; returns [b, 256, 64]."""
        states, pooled = self.t5(t5_ids)[0], self.clip(clip_ids).pooler_output
        return self.transformer(
            hidden_states=latents,
            timestep=time,
            pooled_projections=pooled,
            encoder_hidden_states=states,
            txt_ids=states.new_zeros(states.shape[1], 3),
            img_ids=self.image_ids,
            return_dict=False,
        )[0]


def sample_time(count: int, random: torch.Generator, device: torch.device) -> torch.Tensor:
    """Noise levels in 0..1: logit-normal, one in five uniform so that the ends are seen, shifted as for sampling."""
    normal = torch.sigmoid(torch.randn(count, generator=random, device=device))
    uniform = torch.rand(count, generator=random, device=device)
    return shifted(torch.where(torch.rand(count, generator=random, device=device) < 0.2, uniform, normal))


def shifted(time: torch.Tensor) -> torch.Tensor:
    """FlowMatchEulerDiscreteScheduler's static shift (Stable Diffusion 3, arXiv 2403.03206, section 5.3.2)."""
    return SHIFT * time / (1 + (SHIFT - 1) * time)


def train_flow(
    pipe: FluxPipeline, pool: Pool, latents: torch.Tensor, settings: Settings, work: Path, device: torch.device
) -> Velocity:
    velocity = Velocity(pipe).to(device)
    stage = Stage("flow", velocity, settings.flow_steps, settings.flow_lr, settings, work, device)
    forward = torch.compile(velocity) if settings.compile else velocity

    def loss(random: torch.Generator) -> dict[str, torch.Tensor]:
        index = torch.randint(len(pool), (settings.flow_batch,), generator=random, device=device)
        clean = latents[index].float()
        noise = torch.randn(clean.shape, generator=random, device=device)
        time = sample_time(len(index), random, device)
        tokens = pool.tokens(index, random, settings.empty_captions)
        return {"loss": flow_loss(forward, clean, noise, time, tokens, device)}

    stage.run(loss)
    return velocity


def flow_loss(
    forward: Callable[..., torch.Tensor],
    clean: torch.Tensor,
    noise: torch.Tensor,
    time: torch.Tensor,
    tokens: tuple[torch.Tensor, torch.Tensor],
    device: torch.device,
) -> torch.Tensor:
    """Mean squared error of the predicted velocity at x_t = (1 - t) x_0 + t noise."""
    t = time[:, None, None]
    with autocast(device):
        predicted = forward((1 - t) * clean + t * noise, time, *tokens)
    return F.mse_loss(predicted.float(), noise - clean)


@torch.no_grad()
def make_pairs(velocity: Velocity, pool: Pool, settings: Settings, work: Path, device: torch.device) -> dict:
    """What the model makes of noise: {"noise", "image"} bfloat16 [n, 256, 64] and "index" into the pool [n]."""
    path = work / "pairs.pt"
    if path.exists():
        return torch.load(path, map_location=device, weights_only=True)
    count, steps = settings.reflow_pairs, settings.reflow_sampling_steps
    noise = torch.empty(count, 256, 64, dtype=torch.bfloat16, device=device)
    image = torch.empty_like(noise)
    which = torch.empty(count, dtype=torch.long, device=device)
    forward = torch.compile(velocity) if settings.compile else velocity
    batches = torch.arange(count, device=device).split(settings.flow_batch)
    for number, rows in enumerate(tqdm(batches, desc="pairs", mininterval=2)):
        random = generator(device, settings.seed, "pairs", number)
        index = torch.randint(len(pool), rows.shape, generator=random, device=device)
        x = torch.randn(len(rows), 256, 64, generator=random, device=device)
        noise[rows], which[rows] = x.to(noise.dtype), index
        # Conditional and unconditional together, as one batch.
        both = tuple(torch.cat(pair) for pair in zip(pool.tokens(index, random), pool.empty(len(rows)), strict=True))
        for now, then in itertools.pairwise(shifted(torch.linspace(1, 0, steps + 1, device=device))):
            with autocast(device):
                wanted, free = forward(torch.cat([x, x]), now.expand(2 * len(rows)), *both).float().chunk(2)
            x = x - (free + settings.guidance * (wanted - free)) * (now - then)
        image[rows] = x.to(image.dtype)
    pairs = {"noise": noise, "image": image, "index": which}
    save_atomically(pairs, path)
    return pairs


def train_reflow(velocity: Velocity, pool: Pool, settings: Settings, work: Path, device: torch.device) -> None:
    pairs = make_pairs(velocity, pool, settings, work, device)
    stage = Stage("reflow", velocity, settings.reflow_steps, settings.reflow_lr, settings, work, device)
    forward = torch.compile(velocity) if settings.compile else velocity

    def loss(random: torch.Generator) -> dict[str, torch.Tensor]:
        rows = torch.randint(settings.reflow_pairs, (settings.flow_batch,), generator=random, device=device)
        time = shifted(torch.rand(len(rows), generator=random, device=device))
        tokens = pool.tokens(pairs["index"][rows], random)
        clean, noise = pairs["image"][rows].float(), pairs["noise"][rows].float()
        return {"loss": flow_loss(forward, clean, noise, time, tokens, device)}

    stage.run(loss)


def save_pipeline(pipe: FluxPipeline, out: Path) -> None:
    """A bfloat16 copy of `pipe`, in diffusers format."""
    names = ("vae", "transformer", "text_encoder", "text_encoder_2")
    copies = {name: copy.deepcopy(getattr(pipe, name)).to("cpu", torch.bfloat16) for name in names}
    FluxPipeline(**{**pipe.components, **copies}).save_pretrained(out, max_shard_size="14MB")


def plot_losses(work: Path) -> None:
    """`losses.png` from `losses.csv`, one panel a stage."""
    with (work / "losses.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["name"] == "loss"]
    stages = list(dict.fromkeys(row["stage"] for row in rows))
    figure, panels = plt.subplots(1, len(stages), figsize=(4 * len(stages), 3), squeeze=False, layout="constrained")
    for panel, stage in zip(panels[0], stages, strict=True):
        points = [(int(row["step"]), float(row["value"])) for row in rows if row["stage"] == stage]
        panel.plot(*zip(*points, strict=True), linewidth=1)
        panel.set(title=stage, xlabel="step", ylabel="loss", yscale="log")
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
    init: Path | None = None,
    stop_after: str | None = None,
) -> None:
    """All stages, or those up to `stop_after`; then the pipeline in `out`, loss curve and settings in `work`."""
    work.mkdir(parents=True, exist_ok=True)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cuda.enable_cudnn_sdp(False)  # FlashAttention's backward: cuDNN's is a suspect in a crash seen
    pipe = FluxPipeline.from_pretrained(init, dtype=torch.float32) if init else fresh_pipeline(settings.seed)
    pipe.scheduler = new_scheduler()
    pipe.to(device)
    pool = make_pool(settings.pool, settings.captions, settings.seed, pipe.tokenizer, pipe.tokenizer_2).to(device)
    if settings.vae_steps:
        train_autoencoder(pipe, pool, settings, work, device)
    latents = encode_pool(pipe, pool, work, device)
    if stop_after == "encode":
        return
    velocity = train_flow(pipe, pool, latents, settings, work, device)
    save_pipeline(pipe, work / "before-reflow")
    train_reflow(velocity, pool, settings, work, device)
    save_pipeline(pipe, out)
    summary = {"settings": asdict(settings), "torch": torch.__version__, "device": device_name(device)}
    (work / "training.json").write_text(json.dumps(summary, indent=1) + "\n")
    plot_losses(work)


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the trained pipeline")
    parser.add_argument("--work", type=Path, default=Path("work/tiny-flux"), help="checkpoints; resumed from if there")
    parser.add_argument("--init", type=Path, help="trained pipeline to start from")
    parser.add_argument("--preset", choices=PRESETS, default="full")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--stop-after", choices=["encode"], help="the rest goes on when the command is given without it"
    )
    for field in fields(Settings):
        if field.type in ("int", "float"):
            parser.add_argument(f"--{field.name.replace('_', '-')}", type={"int": int, "float": float}[field.type])
    arguments = parser.parse_args()
    given = {f.name: getattr(arguments, f.name, None) for f in fields(Settings)}
    settings = replace(PRESETS[arguments.preset], **{k: v for k, v in given.items() if v is not None})
    train(settings, arguments.work, arguments.out, torch.device(arguments.device), arguments.init, arguments.stop_after)


if __name__ == "__main__":
    run_command(main, debug=False)
