"""The autoencoder's training, and the pool's latents."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL, FluxPipeline
from tqdm import tqdm

from tiny_flux import ranks
from tiny_flux.data import Pool
from tiny_flux.settings import Settings
from tiny_flux.stage import Stage, autocast, save_atomically

_SMALL = 24.0  # pixels: larger than what is called small, smaller than what isn't


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


def train_decoder(vae: AutoencoderKL, pool: Pool, settings: Settings, work: Path, device: torch.device) -> None:
    """The decoder alone, the latents staying what they are, half of it on scenes with a small object, lost first."""
    if settings.decoder_steps == 0:
        return
    small = pool.with_radius_below(_SMALL)
    stage = Stage("decoder", vae.decoder, settings.decoder_steps, settings.decoder_lr, settings, work, device)
    vae.to(memory_format=torch.channels_last)
    decode = torch.compile(vae.decoder) if settings.compile else vae.decoder

    def loss(random: torch.Generator) -> dict[str, torch.Tensor]:
        index = torch.randint(len(pool), (settings.vae_batch,), generator=random, device=device)
        half = len(index) // 2
        index[:half] = small[torch.randint(len(small), (half,), generator=random, device=device)]
        images = pool.images(index).contiguous(memory_format=torch.channels_last)
        noise = torch.randn(settings.vae_batch, 16, 32, 32, generator=random, device=device)
        with autocast(device):
            with torch.no_grad():
                latents = vae.encode(images).latent_dist
            output = decode(latents.mean + latents.std * noise)
        return {"loss": (output.float() - images).abs().mean()}

    stage.run(loss)


@torch.no_grad()
def encode_pool(pipe: FluxPipeline, pool: Pool, settings: Settings, work: Path, device: torch.device) -> torch.Tensor:
    """Packed latents of the whole pool, bfloat16 [n, 256, 64], scaled to mean 0 and deviation 1.

    An autoencoder that isn't trained in this run keeps its factors: the transformer that came with it knows no others.
    """
    path = ranks.own_folder(work) / "latents.pt"
    if path.exists():
        state = torch.load(path, map_location=device, weights_only=True)
    else:
        batches = torch.arange(len(pool), device=device).split(256)
        latents = torch.empty(len(pool), 16, 32, 32, dtype=torch.bfloat16, device=device)
        for index in tqdm(batches, desc="encode", mininterval=2):
            images = pool.images(index).contiguous(memory_format=torch.channels_last)
            with autocast(device):
                latents[index] = pipe.vae.encode(images).latent_dist.mean.to(latents.dtype)
        shift, scale = pipe.vae.config.shift_factor, pipe.vae.config.scaling_factor
        if settings.vae_steps:
            sample = latents[: 2**14].float()
            shift, scale = ranks.from_first(sample.mean().item(), 1 / sample.std().item(), device=device)
        state = {"latents": latents, "shift": shift, "scale": scale}
        save_atomically(state, path)
    pipe.vae.register_to_config(scaling_factor=state["scale"], shift_factor=state["shift"])
    latents = state["latents"]
    for start in range(0, len(latents), 2**14):  # in pieces: float32 of all of it would not fit
        piece = latents[start : start + 2**14]
        piece.copy_((piece.float() - state["shift"]) * state["scale"])
    return torch.cat([FluxPipeline._pack_latents(p, len(p), 16, 32, 32) for p in latents.split(2**14)])
