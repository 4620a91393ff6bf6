"""FLUX.1 at full size with random weights, made directly on the device: for timing where the real ones can't be had.

Speed doesn't depend on the weights' values beyond the power they draw; image quality does, so nothing may be said of
it. The architecture is that of the published configurations. The tokenizers are the embedded model's, whose ids are
valid in the larger vocabularies.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer


def build(
    kind: type[DiffusionPipeline],
    guidance_embeds: bool,
    dtype: torch.dtype,
    device: torch.device,
    seed: int,
    tokenizers: Path,
) -> DiffusionPipeline:
    """A pipeline of class `kind`; `guidance_embeds` for dev and Kontext, without for schnell.

    12 B transformer, 4.8 B T5-XXL, CLIP-L and VAE: 34 GB in bfloat16.
    """
    clip_tokenizer = CLIPTokenizer.from_pretrained(tokenizers / "tokenizer")
    with creating(dtype, device, seed):
        components = {
            "transformer": FluxTransformer2DModel(guidance_embeds=guidance_embeds),
            "vae": AutoencoderKL(
                block_out_channels=(128, 256, 512, 512),
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
                layers_per_block=2,
                latent_channels=16,
                sample_size=1024,
                scaling_factor=0.3611,
                shift_factor=0.1159,
                use_quant_conv=False,
                use_post_quant_conv=False,
            ),
            "text_encoder": CLIPTextModel(_clip_l(clip_tokenizer)),
            "text_encoder_2": T5EncoderModel(_t5_xxl()),
        }
    for module in components.values():
        module.eval().requires_grad_(False)
    scheduler = FlowMatchEulerDiscreteScheduler(
        **({"shift": 3.0, "use_dynamic_shifting": True} if guidance_embeds else {"shift": 1.0})
    )
    return kind(
        scheduler=scheduler,
        tokenizer=clip_tokenizer,
        tokenizer_2=T5Tokenizer.from_pretrained(tokenizers / "tokenizer_2"),
        **components,
    )


@contextmanager
def creating(dtype: torch.dtype, device: torch.device, seed: int) -> Iterator[None]:
    """Modules made inside have their parameters as `dtype` on `device`, drawn from `seed`."""
    before = torch.get_default_dtype()
    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda), device:
        torch.manual_seed(seed)
        torch.set_default_dtype(dtype)
        try:
            yield
        finally:
            torch.set_default_dtype(before)


def _clip_l(tokenizer: CLIPTokenizer) -> CLIPTextConfig:
    return CLIPTextConfig(
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        projection_dim=768,
        eos_token_id=tokenizer.eos_token_id,  # its position is where the pooled state is read
    )


def _t5_xxl() -> T5Config:
    return T5Config(
        d_model=4096,
        d_kv=64,
        d_ff=10240,
        num_layers=24,
        num_heads=64,
        feed_forward_proj="gated-gelu",
        is_encoder_decoder=False,
        use_cache=False,
    )
