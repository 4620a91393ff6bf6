"""The ranges around a pipeline call's stages."""

from __future__ import annotations

import inspect
import itertools
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    FluxImg2ImgPipeline,
    FluxKontextInpaintPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from torch.profiler import ProfilerActivity, profile
from transformers import CLIPTextConfig, CLIPTextModel

import recipes
from recipes import Recipe
from utils.ranges import SCHEDULER_STEP, annotate, watch


class Log:
    """Records how ranges open and close."""

    def __init__(self) -> None:
        self.events: list[tuple[str, str]] = []

    @contextmanager
    def range(self, stage: str) -> Iterator[None]:
        self.events.append(("open", stage))
        yield
        self.events.append(("close", stage))


def expected(steps: int) -> list[tuple[str, str]]:
    stages = ["prompt_encoding", *["denoising_step"] * steps, "decoding", "postprocessing"]
    return [event for stage in stages for event in (("open", stage), ("close", stage))]


def attributes(pipe: Any) -> list[dict[str, Any]]:
    owners = (pipe, pipe.vae, pipe.scheduler, pipe.image_processor)
    return [{k: v for k, v in vars(owner).items() if callable(v)} for owner in owners]


@pytest.mark.parametrize("sync_removal", [False, True])
def test_one_range_each_in_order(tiny: Callable, draw: Callable, sync_removal: bool) -> None:
    pipe, log = tiny(), Log()
    recipes.apply(pipe, Recipe(scheduler_sync_removal=sync_removal))
    before = attributes(pipe)
    with watch(pipe, log.range):
        draw(pipe, steps=3)
        draw(pipe, steps=1)
    assert log.events == expected(3) + expected(1)
    assert attributes(pipe) == before
    draw(pipe)
    assert len(log.events) == len(expected(3) + expected(1)), "outside of it nothing is recorded"


def test_ranges_in_a_profiler_trace(tiny: Callable, draw: Callable, tmp_path: Path) -> None:
    pipe = tiny()
    with annotate(pipe), profile(activities=[ProfilerActivity.CPU]) as recorded:
        draw(pipe, steps=2)
    recorded.export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    every = sorted((e for e in events if e.get("cat") == "user_annotation"), key=lambda e: e["ts"])
    ours = [e for e in every if e["name"] != SCHEDULER_STEP]
    stages = [stage for kind, stage in expected(2) if kind == "open"]
    assert [e["name"] for e in ours] == stages
    for one, following in itertools.pairwise(ours):
        assert one["ts"] + one["dur"] <= following["ts"]
    # The steps lie back to back and hold the transformer; the VAE's convolutions are in decoding.
    products = [e["ts"] for e in events if e.get("name") == "aten::addmm"]
    convolutions = [e["ts"] for e in events if e.get("name") == "aten::conv2d"]
    steps = [e for e in ours if e["name"] == "denoising_step"]
    assert all(any(s["ts"] <= t <= s["ts"] + s["dur"] for t in products) for s in steps)
    # Each step ends with its scheduler's.
    scheduled = [e for e in every if e["name"] == SCHEDULER_STEP]
    assert len(scheduled) == 2
    for step, inner in zip(steps, scheduled, strict=True):
        assert step["ts"] <= inner["ts"]
        assert inner["ts"] + inner["dur"] <= step["ts"] + step["dur"]
    (decoding,) = (e for e in ours if e["name"] == "decoding")
    assert convolutions
    assert all(decoding["ts"] <= t <= decoding["ts"] + decoding["dur"] for t in convolutions)


@pytest.mark.parametrize("where", ["transformer", "vae"])
def test_restored_when_the_pipeline_raises(tiny: Callable, draw: Callable, where: str) -> None:
    pipe, log = tiny(), Log()
    before = attributes(pipe)

    def fail(*_: Any) -> None:
        raise RuntimeError("broken off")

    module = pipe.transformer if where == "transformer" else pipe.vae.decoder
    hook = module.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="broken off"), watch(pipe, log.range):
        draw(pipe)
    assert attributes(pipe) == before
    opened = [stage for kind, stage in log.events if kind == "open"]
    assert opened == ["prompt_encoding", "denoising_step", *(["decoding"] if where == "vae" else [])]
    hook.remove()
    with watch(pipe, log.range):
        log.events.clear()
        draw(pipe, steps=2)
    assert log.events == expected(2)


@pytest.mark.parametrize("sync_removal", [False, True])
@pytest.mark.parametrize("kind", [FluxImg2ImgPipeline, FluxKontextInpaintPipeline])
def test_steps_that_an_image_to_start_from_leaves_out(
    tiny: Callable, draw: Callable, kind: type[DiffusionPipeline], sync_removal: bool
) -> None:
    pipe, log = kind(**tiny().components), Log()
    pipe.set_progress_bar_config(disable=True)
    recipes.apply(pipe, Recipe(scheduler_sync_removal=sync_removal))
    image = Image.radial_gradient("L").resize((64, 64)).convert("RGB")
    more = {"mask_image": image, "max_area": 64 * 64, "_auto_resize": False} if "Inpaint" in kind.__name__ else {}
    with watch(pipe, log.range):
        draw(pipe, image=image, strength=0.5, steps=4, **more)
    assert log.events == expected(2)


def test_interrupted_call(tiny: Callable, draw: Callable) -> None:
    """Its last range is of the step that was left out."""
    pipe, log = tiny(), Log()

    def interrupt(pipe: Any, index: int, *_: Any) -> dict:
        pipe._interrupt = index == 1
        return {}

    with watch(pipe, log.range):
        draw(pipe, steps=5, callback_on_step_end=interrupt)
    assert log.events == expected(3)


def test_decoding_between_two_steps(tiny: Callable, draw: Callable) -> None:
    """As a preview does: within the step, which goes on."""
    pipe, log = tiny(), Log()

    def preview(pipe: Any, index: int, *_: Any) -> dict:
        if index == 0:
            pipe.vae.decode(torch.zeros(1, 16, 8, 8))
        return {}

    with watch(pipe, log.range):
        draw(pipe, steps=2, callback_on_step_end=preview)
    inside = [("open", "decoding"), ("close", "decoding")]
    assert log.events == [*expected(2)[:5], *inside, *expected(2)[5:]]


def test_signatures_stay(tiny: Callable) -> None:
    """By which diffusers tells whether a scheduler takes sigmas."""
    pipe = tiny()
    before = [inspect.signature(one) for one in (pipe.scheduler.set_timesteps, pipe.scheduler.step, pipe.encode_prompt)]
    with annotate(pipe):
        scheduler = pipe.scheduler
        assert [
            inspect.signature(one) for one in (scheduler.set_timesteps, scheduler.step, pipe.encode_prompt)
        ] == before


def test_pipeline_that_does_not_call_set_begin_index(tiny: Callable) -> None:
    """Stable Diffusion of a few parameters: another pipeline class, scheduler and order of calls."""
    text = CLIPTextConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    pipe = StableDiffusionPipeline(
        vae=AutoencoderKL(block_out_channels=(32,), latent_channels=4, norm_num_groups=8),
        text_encoder=CLIPTextModel(text),
        tokenizer=tiny().tokenizer,
        unet=UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(32, 32),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=32,
            norm_num_groups=8,
        ),
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    log = Log()
    before = attributes(pipe)
    with watch(pipe, log.range), torch.no_grad():
        pipe("a red circle", height=16, width=16, num_inference_steps=3)
    assert log.events == expected(3)
    assert attributes(pipe) == before
