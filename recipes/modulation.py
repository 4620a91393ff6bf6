"""The AdaLN modulation of all steps, once before the loop: one GEMM a Linear instead of one a Linear and step.

FLUX.1 modulates every block by Linear(SiLU(vector)), where the vector depends on timestep, guidance and the pooled
prompt alone: 3.2 of 11.9 B weights, read at each step for one row of output. All steps' vectors are known once the
scheduler has its timesteps; what the Linears give for them is 2.1 MB a step and image in bfloat16. A step finds its row
by which of the scheduler's timesteps the pipeline is at, or by its own, on the device: nothing waits, and steps may be
left out or come in any order.

`offloaded` keeps the Linears in pinned host memory, 6.5 GB less on the GPU, and streams them through it once a call.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline, FluxTransformer2DModel
from torch import nn

from recipes.hoisting import Hoisted, Remembered, conditioning, end_with_call, hoist, modulated
from recipes.optimization import Needs, Optimization
from recipes.recipe import Recipe


class Precomputed(nn.Module):
    """Stands where an AdaLN's Linear stood: its output lies ready in the input, from column `start` on.

    Weight and bias keep their names. `forward` takes [batch, columns] and gives [batch, out_features].
    """

    def __init__(self, linear: nn.Linear, start: int):
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.start, self.out_features = start, linear.out_features

    def forward(self, row: torch.Tensor) -> torch.Tensor:
        return row[:, self.start : self.start + self.out_features]

    def compute(self, vectors: torch.Tensor) -> torch.Tensor:
        """The Linear itself, of [n, dim]; its weights may be on the host."""
        weight, bias = (p.to(vectors.device, non_blocking=True) for p in (self.weight, self.bias))
        return F.linear(vectors, weight, bias)


class HoistedModulation:
    """The modulation's rows of a pipeline's transformer: of all of a loop's steps, and the one that a call asks for."""

    def __init__(self, pipe: DiffusionPipeline):
        self.pipe, self.transformer = pipe, pipe.transformer
        self.linears = [linear for group in _precompute(self.transformer) for linear in group]
        self.table = Remembered(self._table)
        self.rows_of_steps = Hoisted("modulation", self._rows_of_steps)

    def replace(self, arguments: dict[str, Any]) -> dict[str, Any]:
        if "modulation" in arguments:
            return arguments
        timestep, guidance = arguments.pop("timestep"), arguments.pop("guidance", None)
        pooled = arguments.pop("pooled_projections")
        if timestep.ndim == 2:  # of all of a loop's steps
            rows = self.rows_of_steps(timestep, guidance, pooled)
        elif getattr(self.pipe, "_current_timestep", None) is None:  # called by hand, not from the pipeline's loop
            rows = self.rows_of_steps(timestep[None], guidance, pooled)[0]
        else:
            timesteps = self.pipe.scheduler.timesteps
            steps, table = self.table(timesteps, timestep.dtype, len(timestep), guidance, pooled)
            position = _position(self.pipe._current_timestep, timesteps)
            rows = _found(steps, table, timestep) if position is None else _at(position, steps, table, timestep)
        return {**arguments, "modulation": rows}

    def rows(
        self, timestep: torch.Tensor, guidance: torch.Tensor | None, pooled_projections: torch.Tensor
    ) -> torch.Tensor:
        """[n, width], the Linears' outputs side by side, of timesteps [n] in 0..1 and their guidance and prompts."""
        vectors = F.silu(conditioning(self.transformer, timestep, guidance, pooled_projections))
        return torch.cat([linear.compute(vectors) for linear in self.linears], dim=1)

    def _table(
        self,
        timesteps: torch.Tensor,
        dtype: torch.dtype,
        batch: int,
        guidance: torch.Tensor | None,
        pooled: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """All steps' timesteps in 0..1, [steps], and their rows, [steps, batch, width]."""
        steps = timesteps.to(pooled.device, dtype) / 1000  # rounded as the pipeline rounds it
        return steps, self.rows_of_steps(steps[:, None].expand(-1, batch), guidance, pooled)

    def _rows_of_steps(
        self, timesteps: torch.Tensor, guidance: torch.Tensor | None, pooled: torch.Tensor
    ) -> torch.Tensor:
        """[steps, batch, width] of timesteps [steps, batch] in 0..1, and the images' guidance and prompts.

        guidance [batch], pooled [batch, features]; or of one row, for all images: so come a user's own embeddings.
        """
        steps, batch = timesteps.shape
        everyone = None if guidance is None else guidance.expand(batch).repeat(steps)
        prompts = pooled.expand(batch, -1).repeat(steps, 1)
        return self.rows(timesteps.flatten(), everyone, prompts).unflatten(0, timesteps.shape)


def _precompute(transformer: FluxTransformer2DModel) -> list[tuple[Precomputed, ...]]:
    """Put `Precomputed` in place of every AdaLN's Linear, and nothing in place of the SiLU before it."""
    names = {id(linear): name for name, linear in transformer.named_modules() if isinstance(linear, nn.Linear)}
    groups = []
    for group in modulated(transformer):
        start, replaced = 0, []
        for linear in group:
            norm = transformer.get_submodule(names[id(linear)].rpartition(".")[0])
            norm.linear, norm.silu = Precomputed(linear, start), nn.Identity()
            start += linear.out_features
            replaced.append(norm.linear)
        groups.append(tuple(replaced))
    return groups


def _position(timestep: Any, timesteps: torch.Tensor) -> int | None:
    """Which element of `timesteps` [steps] the tensor `timestep` is a view of; None if it isn't one."""
    if not isinstance(timestep, torch.Tensor) or timestep.numel() != 1 or timestep.dtype != timesteps.dtype:
        return None
    if timestep.untyped_storage().data_ptr() != timesteps.untyped_storage().data_ptr():
        return None
    position = int(timestep.storage_offset()) - int(timesteps.storage_offset())
    return position if timesteps.is_contiguous() and 0 <= position < len(timesteps) else None


def _at(position: int, steps: torch.Tensor, table: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
    """`_found` where it is known that this is the step: a third of its launches, which the host pays for."""
    torch._assert_async(
        (timestep == steps[position]).all(),
        "modulation: the transformer was called at another timestep than the one that the pipeline is at",
    )
    return table[position]


def _found(steps: torch.Tensor, table: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
    """The rows [batch, width] of `table` [steps, batch, width] for each image's `timestep` [batch]."""
    found = timestep[:, None] == steps
    torch._assert_async(
        found.any(dim=1).all(), "modulation: the transformer was called at a timestep that isn't the scheduler's"
    )
    return table[found.int().argmax(dim=1), torch.arange(len(timestep), device=timestep.device)]


def _offload(linears: list[Precomputed]) -> int:
    """Move the Linears' weights to pinned host memory; returns their bytes."""
    freed = 0
    for parameter in (p for linear in linears for p in linear.parameters()):
        freed += parameter.nbytes
        parameter.data = parameter.data.to("cpu").pin_memory()
    return freed


def _apply(pipe: DiffusionPipeline, recipe: Recipe) -> str:
    hoisted = HoistedModulation(pipe)
    # Weights that come from the host each time stay out of graphs, whose memory is kept.
    on_device = [] if recipe.modulation == "offloaded" else [hoisted.rows_of_steps]
    hoist(pipe.transformer, hoisted.replace, [hoisted.table], on_device)
    end_with_call(pipe)
    # FluxImg2ImgPipeline and others tell nobody which step they are at; to the transformer, each is a call by hand.
    when = "once a call for all its steps" if hasattr(type(pipe), "current_timestep") else "at each step"
    done = f"{len(hoisted.linears)} Linears {when}"
    if recipe.modulation == "offloaded":
        done += f", their {_offload(hoisted.linears)} bytes in host memory"
    return done


OPTIMIZATION = Optimization(
    field="modulation",
    needs=lambda recipe: Needs(device="cuda" if recipe.modulation == "offloaded" else None),
    lossless=lambda recipe: True,
    apply=_apply,
    merges_weights=lambda recipe: True,
    replaces_forward=lambda recipe: True,
)
