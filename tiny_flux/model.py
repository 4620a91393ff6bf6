"""The embedded model's architecture: FLUX in small, in the ordinary diffusers and transformers classes."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

from tiny_flux.scenes import IMAGE_SIZE
from tiny_flux.tokenizers import CLIP_LENGTH

HIDDEN = 256
# FLUX.1-dev's is 3.2 at 1024x1024. With less, few steps find fewer objects (results/tiny-flux/development.json).
SHIFT = 6.0


def new_pipeline(clip_tokenizer: CLIPTokenizer, t5_tokenizer: T5Tokenizer, seed: int) -> FluxPipeline:
    """An untrained pipeline, float32 on the CPU, its weights drawn from `seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return FluxPipeline(
            scheduler=new_scheduler(),
            vae=_vae(),
            text_encoder=_clip(clip_tokenizer),
            tokenizer=clip_tokenizer,
            text_encoder_2=_t5(len(t5_tokenizer)),
            tokenizer_2=t5_tokenizer,
            transformer=_transformer(),
        )


def new_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Noise levels shifted towards the noisy end, where it is decided which objects there are and where."""
    return FlowMatchEulerDiscreteScheduler(shift=SHIFT, use_dynamic_shifting=False)


def _vae() -> AutoencoderKL:
    """f8, 16 latent channels as FLUX's; `scaling_factor` and `shift_factor` are set once it is trained."""
    return AutoencoderKL(
        block_out_channels=(32, 64, 128, 128),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=16,
        sample_size=IMAGE_SIZE,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=1.0,
        shift_factor=0.0,
    )


def _transformer() -> FluxTransformer2DModel:
    transformer = FluxTransformer2DModel(
        in_channels=64,
        num_layers=2,
        num_single_layers=4,
        attention_head_dim=128,
        num_attention_heads=HIDDEN // 128,
        joint_attention_dim=HIDDEN,
        pooled_projection_dim=HIDDEN,
        guidance_embeds=False,
    )
    # adaLN-Zero (DiT, arXiv 2212.09748): every block starts as the identity, the output as zero.
    for name, module in transformer.named_modules():
        if name.endswith(("norm.linear", "norm1.linear", "norm1_context.linear", "norm_out.linear", "proj_out")):
            is_single_output = name.startswith("single_transformer_blocks") and name.endswith("proj_out")
            if not is_single_output:
                torch.nn.init.zeros_(module.weight)
                torch.nn.init.zeros_(module.bias)
    return transformer


def _t5(vocabulary: int) -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(
            vocab_size=vocabulary,
            d_model=HIDDEN,
            d_kv=64,
            d_ff=2 * HIDDEN,
            num_layers=2,
            num_heads=HIDDEN // 64,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
            is_encoder_decoder=False,
            use_cache=False,
        )
    )


def _clip(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=HIDDEN,
            intermediate_size=2 * HIDDEN,
            projection_dim=HIDDEN,
            num_hidden_layers=2,
            num_attention_heads=HIDDEN // 64,
            max_position_embeddings=CLIP_LENGTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
