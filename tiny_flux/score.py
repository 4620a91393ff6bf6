"""Score a checkpoint on held-out prompts with the checker: `python -m tiny_flux.score --output results/tiny-flux`.

500 prompts fixed by a seed, in wordings that training never uses, more than half with combinations of objects that it
never saw; one image a prompt, no best-of. A prompt counts as right when every one of its claims holds and nothing
else is in the image.
"""

from __future__ import annotations

import argparse
import json
import random
import textwrap
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from PIL import Image
from tqdm import tqdm

from utils.quiet import quiet

with quiet():
    from diffusers import DiffusionPipeline

    from tiny_flux.captions import held_out_caption
    from tiny_flux.checker import check, wilson
    from tiny_flux.scenes import CATEGORIES, Description, is_held_out, sample_description
    from utils import checkpoints, environment
    from utils.errors import run_command
    from utils.files import replacing, write_text
    from utils.request import noise

PROMPTS = 500
SEED = 20_000
_GRID = 16


@dataclass(frozen=True)
class Prompt:
    text: str
    description: Description


def held_out_prompts(count: int = PROMPTS, seed: int = SEED) -> list[Prompt]:
    """The same prompts for the same arguments, the categories taking turns.

    Four in five of those whose combination can be held out have a held-out one; a lone uncoloured shape can't.
    """
    rng = random.Random(f"held-out prompts {seed}")
    prompts: list[Prompt] = []
    while len(prompts) < count:
        category = CATEGORIES[len(prompts) % len(CATEGORIES)]
        wanted = category != "single_object" and rng.random() < 0.8
        description = sample_description(rng, category)
        while is_held_out(description) != wanted:
            description = sample_description(rng, category)
        text = held_out_caption(description, rng)
        if all(text != prompt.text for prompt in prompts):
            prompts.append(Prompt(text, description))
    return prompts


def draw(
    pipe: DiffusionPipeline, prompts: Sequence[Prompt], seeds: Sequence[int], steps: int, batch: int
) -> Iterator[Image.Image]:
    """One image a prompt, as they come; `seeds` holds one of each, so that it is the same whatever the batch."""
    pipe.set_progress_bar_config(disable=True)
    known = checkpoints.TINY
    for start in tqdm(range(0, len(prompts), batch), desc=f"{steps} steps"):
        yield from pipe(
            prompt=[prompt.text for prompt in prompts[start : start + batch]],
            num_inference_steps=steps,
            guidance_scale=known.guidance,
            height=known.height,
            width=known.width,
            max_sequence_length=known.max_sequence_length,
            latents=noise(pipe, known.height, known.width, seeds[start : start + batch]),
        ).images


def score(prompts: list[Prompt], images: list[Image.Image]) -> dict[str, Any]:
    """Right prompts by category and over all, with Wilson 95 % intervals; and which prompts were wrong, and why."""
    right: dict[str, list[bool]] = defaultdict(list)
    wrong = []
    for prompt, image in zip(prompts, images, strict=True):
        verdict = check(image, prompt.description)
        right[prompt.description.category].append(verdict.right)
        right["all"].append(verdict.right)
        if not verdict.right:
            failed = [claim for claim, holds in verdict.claims.items() if not holds]
            wrong.append({"prompt": prompt.text, "failed": failed})
    categories = {}
    for name in (*CATEGORIES, "all"):
        low, high = wilson(sum(right[name]), len(right[name]))
        accuracy = sum(right[name]) / len(right[name])
        categories[name] = {
            "right": sum(right[name]),
            "of": len(right[name]),
            "accuracy": accuracy,
            "low": low,
            "high": high,
        }
    return {"categories": categories, "wrong": wrong}


def table(result: dict[str, Any]) -> str:
    """The scores in Markdown, a row a category, a column for each number of steps."""
    steps = result["steps"]
    lines = [
        f"`{result['checkpoint']}` on {result['prompts']} held-out prompts (seed {result['seed']}), "
        f"{result['held_out_combinations']:.0%} of them with combinations of objects never trained on; one image a "
        "prompt; share of prompts with every claim right, with its Wilson 95 % interval.",
        "",
        "| category | " + " | ".join(f"{count} steps" for count in steps) + " |",
        "|---" * (1 + len(steps)) + "|",
    ]
    for name in (*CATEGORIES, "all"):
        rows = [scored["categories"][name] for scored in steps.values()]
        cells = [f"{row['accuracy']:.1%} ({row['low']:.1%} to {row['high']:.1%})" for row in rows]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def save_grid(prompts: list[Prompt], images: list[Image.Image], path: Path) -> None:
    """The first 16 images under their prompts."""
    figure = Figure(figsize=(10, 11), layout="constrained")
    for panel, prompt, image in zip(figure.subplots(4, 4).flat, prompts, images, strict=False):
        panel.imshow(image)
        panel.set_title(textwrap.fill(prompt.text, 38), fontsize=8)
        panel.axis("off")
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="tiny")
    parser.add_argument("--steps", type=int, nargs="+", default=[28, 4])
    parser.add_argument("--prompts", type=int, default=PROMPTS)
    parser.add_argument("--seed", type=int, default=SEED, help="of prompts and noise")
    parser.add_argument("--batch", type=int, default=10)
    parser.add_argument("--shift", type=float, help="of the noise levels, towards noise (default: the checkpoint's)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, required=True, help="folder for scores.json and a grid for each --steps")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    pipe = checkpoints.load(arguments.checkpoint, torch.float32, device)
    if arguments.shift is not None:
        pipe.scheduler.set_shift(arguments.shift)
    prompts = held_out_prompts(arguments.prompts, arguments.seed)
    seeds = range(arguments.seed, arguments.seed + len(prompts))
    arguments.output.mkdir(parents=True, exist_ok=True)
    unseen = sum(is_held_out(prompt.description) for prompt in prompts) / len(prompts)
    result: dict[str, Any] = {
        "checkpoint": arguments.checkpoint,
        "prompts": len(prompts),
        "seed": arguments.seed,
        "shift": pipe.scheduler.shift,
        "held_out_combinations": unseen,
        "environment": environment.capture(device),
        "steps": {},
    }
    for steps in arguments.steps:
        images = list(draw(pipe, prompts, seeds, steps, arguments.batch))
        result["steps"][str(steps)] = scored = score(prompts, images)
        for name, figures in scored["categories"].items():
            interval = f"({figures['low']:.1%} to {figures['high']:.1%})"
            print(f"{steps:3d} steps  {name:18s} {figures['accuracy']:6.1%}  {interval}")
        save_grid(prompts[:_GRID], images[:_GRID], arguments.output / f"first-16-at-{steps}-steps.png")
    write_text(arguments.output / "scores.json", json.dumps(result, indent=1) + "\n")
    write_text(arguments.output / "scores.md", table(result))


if __name__ == "__main__":
    run_command(main, debug=False)
