"""A stage of training: resumable, seeded, logged."""

from __future__ import annotations

import csv
import hashlib
import math
import os
from collections.abc import Callable, Collection
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from tiny_flux import ranks
from tiny_flux.muon import Muon
from tiny_flux.settings import Settings
from utils.files import replacing


class Stage:
    """A resumable loop over optimizer steps: AdamW or Muon, warm-up and cosine decay, EMA, loss log, checkpoints.

    Step `s` of a stage draws its randomness from a generator seeded by (seed, stage, s), so that a resumed run
    makes the very steps that an uninterrupted one makes.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        steps: int,
        lr: float,
        settings: Settings,
        work: Path,
        device: torch.device,
        matrices: Collection[nn.Parameter] = (),
        ema: float | None = None,
    ):
        """matrices: those of `module`'s parameters that Muon trains, AdamW the others. ema: if not the settings'."""
        self.name, self.module, self.steps, self.lr = name, module, steps, lr
        self.settings, self.device, self.work = settings, device, work
        self.ema_decay = settings.ema if ema is None else ema
        self.path = work / f"{name}.pt"
        for_muon = {id(p) for p in matrices}
        rest = [p for p in module.parameters() if id(p) not in for_muon]
        decay, other = [p for p in rest if p.ndim >= 2], [p for p in rest if p.ndim < 2]
        adamw = torch.optim.AdamW(
            [{"params": decay, "weight_decay": 0.01}, {"params": other, "weight_decay": 0.0}],
            lr=lr,
            betas=(0.9, 0.99),
            fused=device.type == "cuda",
        )
        self.optimizers: list[torch.optim.Optimizer] = [adamw]
        if matrices:
            # Steps as large as AdamW's, so that one learning rate serves both.
            self.optimizers.append(Muon(matrices, lr=lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"))
        self.parameters = [*matrices, *decay, *other]
        ranks.share(self.parameters)
        self.ema = [p.detach().clone() for p in self.parameters]
        self.step = 0
        if self.path.exists():
            state = torch.load(self.path, map_location=device, weights_only=True)
            module.load_state_dict(state["module"])
            for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
            self.ema, self.step = state["ema"], state["step"]
            if ranks.is_first():
                self._forget_losses_after(self.step)

    def run(self, loss: Callable[[torch.Generator], dict[str, torch.Tensor]]) -> None:
        """Train to the end; `loss(generator)` returns the loss under "loss" and what else to log."""
        self.module.train()
        seen: list[dict[str, torch.Tensor]] = []
        first, seed = ranks.is_first(), ranks.own_seed(self.settings.seed)
        progress = tqdm(total=self.steps, initial=self.step, desc=self.name, mininterval=2, disable=not first)
        while self.step < self.steps:
            for group in (group for optimizer in self.optimizers for group in optimizer.param_groups):
                group["lr"] = self.lr * self._schedule()
            losses = loss(generator(self.device, seed, self.name, self.step))
            losses["loss"].backward()
            ranks.average_gradients(self.parameters)
            nn.utils.clip_grad_norm_(self.parameters, 1.0)
            for optimizer in self.optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            decay = min(self.ema_decay, (self.step + 1) / (self.step + 10))
            torch._foreach_lerp_(self.ema, [p.detach() for p in self.parameters], 1 - decay)
            self.step += 1
            if not first:
                continue
            seen.append({key: value.detach() for key, value in losses.items()})
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
        optimizers = [optimizer.state_dict() for optimizer in self.optimizers]
        state = {"module": self.module.state_dict(), "optimizers": optimizers, "ema": self.ema}
        save_atomically({**state, "step": self.step}, self.path)

    def _forget_losses_after(self, step: int) -> None:
        """What was logged after the checkpoint is trained again, and logged again."""
        path = self.work / "losses.csv"
        if not path.exists():  # nothing was logged yet
            return
        with path.open(newline="") as file:
            header, *rows = csv.reader(file)
        kept = [row for row in rows if row[0] != self.name or int(row[1]) <= step]
        with replacing(path) as temporary, temporary.open("w", newline="") as file:
            csv.writer(file).writerows([header, *kept])

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
