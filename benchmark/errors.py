"""What recipes round: `python -m benchmark.errors RECIPE... --checkpoint random/flux-dev --output FILE`.

Relative errors (the L2 norm of the difference over that of the float32 result) of three things, for `--prompts` prompts
with a seed each:

- `step`: what the transformer gives at its first call, all recipes called with the same numbers: noise, and prompt
  embeddings that the float32 text encoders made, both rounded to bfloat16 once. The text encoders' error is not in it.
- `latents`: the final latents of a whole call, from the same noise. All of the recipe's errors are in it, the text
  encoders' too.
- `decoded`: what the VAE's decoder gives, all recipes' with the same numbers: float32's final latents, rounded to
  bfloat16 once.

float32 means the checkpoint's bfloat16 weights in float32, run eagerly without TF32; `ratio` is a recipe's mean error
over that of the rung bf16, also eager. A lossless recipe is held to 1.1 in all. Each recipe loads the checkpoint anew,
and only its results, on the CPU, outlive it: at full size float32 takes 68 GB of the device. FILE is written anew after
every recipe.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any

import torch
from diffusers import DiffusionPipeline

from utils.quiet import quiet

with quiet():
    import recipes
    from benchmark import prompts, recipe_series
    from benchmark.memory import peak_bytes
    from recipes.dtype import cast, torch_dtype
    from recipes.recipe import Recipe
    from utils import checkpoints
    from utils.errors import Parser, UsageError, UserError, run_command
    from utils.exact_convolutions import exact_convolutions
    from utils.relative_error import relative_error
    from utils.request import Request, noise

EXACT, BASELINE = "fp32", "bf16"
LIMIT = 1.1
MEASURED = ("step", "latents", "decoded")

HEADER = (
    f"| recipe | {' | '.join(f'{name}: error | x bf16' for name in MEASURED)} | at most {LIMIT} |\n"
    f"|---|{'--:|--:|' * len(MEASURED)}---|"
)


@dataclass(frozen=True)
class Inputs:
    """What a call starts from, on the CPU: float32 whose values are bfloat16's, so that no recipe rounds them further.

    noise [1, image tokens, 64]; prompt_embeds [1, text tokens, features] by T5 and pooled_prompt_embeds [1, features]
    by CLIP. latents, to be decoded, [1, image tokens, 64]; until they are known, a call's own.
    """

    request: Request
    noise: torch.Tensor
    prompt_embeds: torch.Tensor
    pooled_prompt_embeds: torch.Tensor
    latents: torch.Tensor | None = None

    @classmethod
    def of(cls, pipe: DiffusionPipeline, request: Request) -> Inputs:
        """Noise and embeddings by `pipe`'s text encoders, for the request's first image."""
        with torch.no_grad():
            embeds, pooled, _ = pipe.encode_prompt(
                request.prompt, None, pipe.device, max_sequence_length=request.max_sequence_length
            )
        first = noise(pipe, request.height, request.width, [request.seed])
        return cls(request, *(_rounded(x) for x in (first, embeds, pooled)))


def _rounded(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.cpu().bfloat16().float()


def load(checkpoint: str, device: torch.device) -> DiffusionPipeline:
    """The checkpoint with all of its weights in bfloat16: transformers would leave some of a text encoder as stored."""
    pipe = checkpoints.load(checkpoint, torch.bfloat16, device, progress=False)
    cast(pipe, torch.bfloat16)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def results(pipe: DiffusionPipeline, dtype: torch.dtype, inputs: Inputs) -> dict[str, torch.Tensor]:
    """MEASURED, float32 on the CPU; `dtype` is the one that the pipeline computes in.

    Raises:
        UserError: a result has values that aren't finite.
    """

    def on_device(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(pipe.device, dtype)

    arguments = {**inputs.request.arguments(pipe), "latents": on_device(inputs.noise), "output_type": "latent"}
    embedded = {name: on_device(getattr(inputs, name)) for name in ("prompt_embeds", "pooled_prompt_embeds")}
    given: list[torch.Tensor] = []
    hook = pipe.transformer.register_forward_hook(lambda module, args, output: given.append(output[0].float().cpu()))
    with quiet(), exact_convolutions():
        try:  # any number of steps begins at the same noise level: 1
            pipe(**{**arguments, "prompt": None, **embedded, "num_inference_steps": 1})
        finally:
            hook.remove()
        latents = pipe(**arguments).images.float().cpu()
        decoded = _decode(
            pipe, on_device(_rounded(latents) if inputs.latents is None else inputs.latents), inputs.request
        )
    found = dict(zip(MEASURED, (given[0], latents, decoded), strict=True))
    for name, tensor in found.items():
        if not tensor.isfinite().all():
            raise UserError(f"{name}: {int((~tensor.isfinite()).sum())} of {tensor.numel()} values are not finite")
    return found


@torch.no_grad()
def _decode(pipe: DiffusionPipeline, latents: torch.Tensor, request: Request) -> torch.Tensor:
    """An image [1, 3, height, width], float32 on the CPU, as the pipeline decodes latents [1, image tokens, 64]."""
    unpacked = pipe._unpack_latents(latents, request.height, request.width, pipe.vae_scale_factor)
    config = pipe.vae.config
    unpacked = unpacked / config.scaling_factor + config.shift_factor
    return pipe.vae.decode(unpacked, return_dict=False)[0].float().cpu()


@dataclass
class Comparison:
    """Recipes on the same requests; the first one measured, in float32, is what all others are compared with."""

    checkpoint: str
    requests: Sequence[Request]
    device: torch.device
    _inputs: list[Inputs] = field(default_factory=list)
    _exact: list[dict[str, torch.Tensor]] = field(default_factory=list)
    _baseline: dict[str, float] | None = None

    def measure(self, recipe: Recipe) -> dict[str, Any]:
        """A recipe's figures.

        Raises:
            UserError: what it is compared with failed, or a result isn't finite.
        """
        exact, baseline = recipe == recipes.parse(EXACT), recipe == recipes.parse(BASELINE)
        if not (exact or self._exact) or not (exact or baseline or self._baseline):
            raise UserError(f"there is nothing to compare with: {BASELINE if self._exact else EXACT} was not measured")
        pipe = load(self.checkpoint, self.device)
        applied = recipes.apply(pipe, recipe)
        if exact:
            self._inputs = [Inputs.of(pipe, request) for request in self.requests]
        found = [results(pipe, torch_dtype(recipe), inputs) for inputs in self._inputs]
        row: dict[str, Any] = {"applied": applied, "peak_memory_bytes": peak_bytes(self.device)}
        if exact:
            self._exact = found
            pairs = zip(self._inputs, found, strict=True)
            self._inputs = [replace(one, latents=_rounded(result["latents"])) for one, result in pairs]
            return row
        errors = {
            name: [relative_error(one[name], other[name]) for one, other in zip(found, self._exact, strict=True)]
            for name in MEASURED
        }
        means = {name: fmean(of_requests) for name, of_requests in errors.items()}
        if baseline:
            self._baseline = means
        assert self._baseline is not None
        return {**row, "relative_error": errors, **against(self._baseline, means, recipes.is_lossless(recipe))}


def against(baseline: dict[str, float], errors: dict[str, float], lossless: bool) -> dict[str, Any]:
    """The ratios of `errors` to `baseline`'s, and whether all are at most 1.1, which is asked of a lossless recipe."""
    ratio = {name: errors[name] / baseline[name] for name in MEASURED}
    within = all(x <= LIMIT for x in ratio.values())
    return {"ratio": ratio, "lossless": lossless, "within_limit": within if lossless else None}


def line(row: dict[str, Any]) -> str:
    name = row["recipe"]["name"]
    if "applied" not in row:
        return f"| {name} |{' |' * (2 * len(MEASURED) + 1)}"
    if "ratio" not in row:
        return f"| {name} |{' 0, by definition | |' * len(MEASURED)} |"
    cells = [f"{x:.3g} | {row['ratio'][m]:.2f}" for m in MEASURED for x in (fmean(row["relative_error"][m]),)]
    verdict = {True: "yes", False: "no", None: "lossy"}[row["within_limit"]]
    return f"| {name} | {' | '.join(cells)} | {verdict} |"


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    recipe_series.add_options(parser)
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--height", type=int)
    parser.add_argument("--width", type=int)
    arguments = parser.parse_args()

    def benchmark() -> None:
        device, known = recipe_series.check(arguments)
        if loops := [text for text in arguments.recipes if recipes.parse(text).loop_graph]:
            raise UsageError(f"{loops[0]}: a loop of one launch gives no step to measure, leave loop_graph=true out")
        requests = [
            Request(
                prompts.prompt(arguments.checkpoint, number), arguments.height or known.height,
                arguments.width or known.width, arguments.steps or known.steps, known.guidance,
                known.max_sequence_length, seed=number,
            )
            for number in range(arguments.prompts)
        ]  # fmt: skip
        about = {
            "checkpoint": arguments.checkpoint,
            "requests": [request.to_dict() for request in requests],
            "reference": EXACT,
            "baseline": BASELINE,
            "limit": LIMIT,
        }
        comparison = Comparison(arguments.checkpoint, requests, device)
        recipe_series.run("errors", [EXACT, BASELINE], comparison.measure, HEADER, line, arguments, device, about)

    run_command(benchmark, arguments.debug)


if __name__ == "__main__":
    main()
