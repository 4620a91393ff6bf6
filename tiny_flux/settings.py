"""How long and how fast the embedded model is trained."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """Counts, learning rates and weights of all stages; 0 and 1 are off and on.

    muon: Muon (https://kellerjordan.github.io/posts/muon) for the transformer blocks' projections in `flow`.
    layout_weight, claims_weight: of the losses of tiny_flux/layout.py and tiny_flux/claims.py beside the velocity's.
    time_shift: how far `flow`'s noise levels are shifted towards noise, where it is decided what there is.
    guidance: of the classifier-free guidance that is distilled into the model.
    only_right: of reflow's pairs, keep those where the checker finds every claim of the caption in the image.
    reward_prompts, reward_images: drawn every `reward_updates` steps: so many prompts, so many images for each, in as
        many sampling steps as one of `reward_sampling_steps`.
    reward_categories: half of these prompts are of these categories alone, if any are given.
    reward_beta: how much of the way from the model that drew counts; less lets it go farther at once.
    reward_anchor: how strongly it is held to the model before this stage.
    fine_tuning_share: of what `reflow` and `reward` changed in the weights, how much is kept.
    """

    pool: int = 120_000
    captions: int = 3
    vae_steps: int = 3000
    vae_batch: int = 32
    vae_lr: float = 5e-4
    kl_weight: float = 2e-4
    decoder_steps: int = 3000
    decoder_lr: float = 3e-4
    flow_steps: int = 60_000
    flow_batch: int = 256
    flow_lr: float = 8e-4
    muon: int = 1
    layout_weight: float = 0.05
    claims_weight: float = 0.05
    time_shift: float = 5.0
    empty_captions: float = 0.1
    guidance: float = 2.5
    guidance_steps: int = 4000
    guidance_lr: float = 2e-4
    reflow_pairs: int = 72_000
    reflow_sampling_steps: int = 28
    only_right: int = 1
    reflow_steps: int = 4500
    reflow_lr: float = 3e-4
    reward_steps: int = 240
    reward_lr: float = 5e-5
    reward_prompts: int = 192
    reward_images: int = 8
    reward_sampling_steps: tuple[int, ...] = (4, 4, 28)
    reward_categories: tuple[str, ...] = ()
    reward_updates: int = 16
    reward_batch: int = 256
    reward_beta: float = 0.5
    reward_anchor: float = 0.1
    reward_ema: float = 0.98
    fine_tuning_share: float = 0.85
    ema: float = 0.9995
    save_every: int = 960
    compile: int = 1
    seed: int = 0


PRESETS = {
    "full": Settings(),
    "smoke": Settings(
        pool=64, captions=2, vae_steps=4, vae_batch=4, decoder_steps=2, flow_steps=4, flow_batch=4, guidance_steps=2,
        reflow_pairs=8, reflow_sampling_steps=2, reflow_steps=2, only_right=0, reward_steps=4, reward_prompts=2,
        reward_images=2, reward_sampling_steps=(2,), reward_updates=2, reward_batch=4, save_every=2, compile=0,
    ),
}  # fmt: skip
