"""What recipes cost in accuracy: `python -m benchmark.accuracy RECIPE... --output FILE`.

The embedded model draws the held-out prompts of `tiny_flux.score` with each recipe, `--seeds` images a prompt, and with
the rung bf16 from the same noise. The checker says which images are right. What counts is the paired difference in the
share of right images: a lossy recipe is held to a 95 % interval above -2 points. Prompts are resampled for it, since
the images of one prompt aren't independent. Beside it stand PSNR and SSIM to bf16's images, and whether what is lost
depends on an image's place in its batch, as it mustn't.

FILE is written anew after every recipe, with each image's verdict.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image

from utils.quiet import quiet

with quiet():
    import recipes
    from benchmark import paired, recipe_series
    from recipes.dtype import torch_dtype
    from recipes.recipe import Recipe
    from tiny_flux import score
    from tiny_flux.check_pool import check_pool
    from tiny_flux.checker import check
    from tiny_flux.score import Prompt
    from utils import checkpoints
    from utils.errors import Parser, UsageError, UserError, run_command
    from utils.image_metrics import difference

LIMIT_POINTS = -2.0
REFERENCE = "bf16"
_SEEDS_APART = 1_000_000  # between the noise seeds of a prompt; more than there are prompts

HEADER = (
    "| recipe | right | points to bf16 (95 %) | above -2 | gained, lost | lost, by fifths of a batch | "
    "PSNR dB: median, p10 | SSIM: median, p10 |\n|---|--:|--:|---|--:|--:|--:|--:|"
)


def noise_seeds(prompts: int, seeds: int, first: int) -> list[int]:
    """All prompts' seeds for their first images, then for their second ones, ...: a prompt's own, however many."""
    return [first + _SEEDS_APART * nth + i for nth in range(seeds) for i in range(prompts)]


@dataclass
class Comparison:
    """Recipes that draw the same prompts from the same noise; the first one measured is what the others are held to."""

    checkpoint: str
    prompts: Sequence[Prompt]
    seeds: int
    first_seed: int
    steps: int
    batch: int
    device: torch.device
    checkers: Executor
    _images: list[Image.Image] = field(default_factory=list)
    _right: np.ndarray | None = None

    def measure(self, recipe: Recipe) -> dict[str, Any]:
        """A recipe's figures.

        Raises:
            UserError: there is no reference, because it failed.
        """
        is_reference = recipe == recipes.parse(REFERENCE)
        if not is_reference and self._right is None:
            raise UserError(f"there is nothing to compare with: {REFERENCE} was not measured")
        pipe = checkpoints.load(self.checkpoint, torch_dtype(recipe), self.device, progress=False)
        applied = recipes.apply(pipe, recipe)
        todo = list(self.prompts) * self.seeds
        noise = noise_seeds(len(self.prompts), self.seeds, self.first_seed)
        images, verdicts, differences = [], [], []
        for i, image in enumerate(score.draw(pipe, todo, noise, self.steps, self.batch)):  # checked while it draws on
            images.append(image)
            verdicts.append(self.checkers.submit(check, image, todo[i].description))
            if not is_reference:
                differences.append(self.checkers.submit(difference, image, self._images[i]))
        right = np.array([verdict.result().right for verdict in verdicts]).reshape(self.seeds, len(self.prompts)).T
        categories = paired.accuracies(right, self._right, [prompt.description.category for prompt in self.prompts])
        row = {"applied": applied, "lossless": recipes.is_lossless(recipe), "categories": categories}
        if is_reference:
            self._images, self._right = images, right
        else:
            row["above_limit"] = categories["all"]["difference_points"]["low"] > LIMIT_POINTS
            row["lost_by_place"] = paired.by_place(self._right & ~right, self.batch)
            row["image_difference"] = paired.image_differences([one.result() for one in differences])
        # A prompt's images side by side, 1 for right: "1101".
        return {**row, "right": ["".join("01"[int(x)] for x in images) for images in right]}


def line(row: dict[str, Any]) -> str:
    name = row["recipe"]["name"]
    if "categories" not in row:
        return f"| {name} |"
    every = row["categories"]["all"]
    accuracy = f"{every['accuracy']['value']:.1%}"
    if "image_difference" not in row:
        return f"| {name} | {accuracy} | | | | | | |"
    points, images = every["difference_points"], row["image_difference"]
    psnr = ", ".join("equal" if x is None else f"{x:.1f}" for x in images["psnr_db"].values())
    cells = [
        accuracy,
        f"{points['value']:+.2f} ({points['low']:+.2f} to {points['high']:+.2f})",
        "yes" if row["above_limit"] else "no",
        f"{every['gained']}, {every['lost']}",
        ", ".join(map(str, row["lost_by_place"])),
        psnr,
        ", ".join(f"{x:.4f}" for x in images["ssim"].values()),
    ]
    return f"| {name} | {' | '.join(cells)} |"


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    recipe_series.add_options(parser)
    parser.add_argument("--prompts", type=int, default=score.PROMPTS, help="held-out prompts")
    parser.add_argument("--seeds", type=int, default=4, help="images a prompt")
    parser.add_argument("--seed", type=int, default=score.SEED, help="of the prompts and the first noise")
    parser.add_argument("--batch", type=int, default=50, help="images drawn at once; to change nothing but rounding")
    arguments = parser.parse_args()

    def benchmark() -> None:
        device, known = recipe_series.check(arguments)
        if known.vocabulary != "scenes":
            raise UsageError(f"{arguments.checkpoint}: the checker knows the embedded model's scenes only, use tiny")
        prompts = score.held_out_prompts(arguments.prompts, arguments.seed)
        steps = arguments.steps or known.steps
        about = {
            "checkpoint": arguments.checkpoint,
            "prompts": len(prompts),
            "seeds": arguments.seeds,
            "seed": arguments.seed,
            "steps": steps,
            "batch": arguments.batch,
            "reference": REFERENCE,
            "limit_points": LIMIT_POINTS,
        }
        with check_pool() as checkers:
            comparison = Comparison(
                arguments.checkpoint, prompts, arguments.seeds, arguments.seed, steps, arguments.batch, device, checkers
            )
            recipe_series.run("accuracy", [REFERENCE], comparison.measure, HEADER, line, arguments, device, about)

    run_command(benchmark, arguments.debug)


if __name__ == "__main__":
    main()
