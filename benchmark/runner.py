"""Run jobs, each in a fresh process; climb the ladder, resumably, with the baseline timed at both ends."""

from __future__ import annotations

import difflib
import functools
import math
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

import recipes
from benchmark import fresh_process
from benchmark.job import Job
from recipes.ladder import description
from recipes.recipe import Recipe
from trace_analysis import markdown, tables
from trace_analysis.load import load
from trace_analysis.report import report as trace_report
from trace_analysis.steps import DENOISING_LOOP, DENOISING_STEP
from utils import checkpoints, environment, results
from utils.errors import UsageError, UserError
from utils.files import replacing, write_text
from utils.image_metrics import SAME
from utils.timing import bootstrap_ratio

# Pixels, the longer side of the image kept beside a result. What random weights draw is noise, and packs badly.
THUMBNAIL, THUMBNAIL_OF_NOISE = 256, 96
ONCE = "at the beginning only"
_TRACE = "trace.json.gz"


@dataclass
class Runner:
    """Runs jobs that are like `template` but for recipe, name, parent and files, and keeps their results.

    folder: where result files go. again: measure also what has a result already.
    seconds: the ladder begins no further rung after that long. only: the rungs to measure, all if there are none.
    trace_reports: for each of its rungs, what trace_analysis says of a trace of one call, in the folder's `traces`.
    """

    template: Job
    folder: Path
    again: bool = False
    debug: bool = False
    seconds: float = math.inf
    only: frozenset[str] = frozenset()
    trace_reports: bool = False

    def one(self, name: str, recipe: Recipe, output: Path | None) -> dict[str, Any]:
        """One recipe alone, without a baseline; its image goes to `output` too, at full size."""
        with tempfile.TemporaryDirectory(prefix="flux-fast-") as scratch:
            result, image = self._measure(recipes.Rung(name, None, recipe), Path(scratch) / "only", None)
            if output is not None:
                with Image.open(image) as full, replacing(output) as temporary:
                    full.save(temporary)
            return self._keep(name, result, image)

    def ladder(self, baseline: str, report: Callable[[str], None]) -> list[str]:
        """Every rung; returns the names of those that failed. Kept results are left as they are.

        The baseline is measured at the beginning and at the end, and every ratio is formed with both.

        Raises:
            UserError: the baseline is unknown, can't run here, or failed; there is no such rung as one of `only`.
        """
        rungs = {rung.name: rung for rung in recipes.climb(self._refusal)}
        for what, name in (("baseline", baseline), *(("rung", name) for name in sorted(self.only))):
            if name not in rungs:
                close = difflib.get_close_matches(name, rungs, n=1)
                hint = f"did you mean {close[0]}? It" if close else "it"
                raise UsageError(f"unknown {what} {name!r}: {hint} is one of {', '.join(rungs)}")
        bottom = rungs[baseline]
        if bottom.skipped is not None:
            raise UsageError(f"the baseline {baseline} can't run here: {bottom.skipped}")
        below = list(rungs)[: list(rungs).index(baseline)]
        with tempfile.TemporaryDirectory(prefix="flux-fast-") as scratch:
            asked = set(self.only or rungs)
            if not self._path(baseline).exists():
                asked.add(baseline)  # a table without it would say how many times as fast as nothing
            unmeasured = {*below, *(set(rungs) - asked)}
            return self._climb(bottom, unmeasured, Path(scratch), report)

    def _refusal(self, rung: recipes.Rung) -> str | None:
        device = torch.device(self.template.device)
        return recipes.refusal(rung.recipe, device) or recipes.not_timed(rung.recipe, device)

    def _climb(
        self, bottom: recipes.Rung, unmeasured: Collection[str], scratch: Path, report: Callable[[str], None]
    ) -> list[str]:
        """`bottom` is the baseline; the rungs `unmeasured` are climbed all the same."""
        baseline = bottom.name
        begun = time.monotonic()
        measured: dict[str, dict[str, Any]] = {}
        failed: list[str] = []

        @functools.cache
        def first() -> tuple[dict[str, Any], Path]:
            report(f"{baseline}: the baseline, first time")
            return self._measure(bottom, scratch / "first", None)

        def keep(rung: recipes.Rung, result: dict[str, Any], image: Path) -> None:
            if rung.name == baseline:
                result["image_difference"] = SAME
            if self.trace_reports:
                self._keep_report(rung, image.with_name(_TRACE))
            measured[rung.name] = self._keep(rung.name, with_ratio(result, baseline, first()[0]), image)

        def skip(rung: recipes.Rung) -> str | None:
            """Measure the rung, unless its result is kept; why it is skipped, if it is."""
            reason = self._refusal(rung)
            if reason is not None or rung.name in unmeasured or self._is_kept(rung, baseline):
                return reason
            if rung.name == baseline:
                keep(rung, *first())
                return None
            if time.monotonic() - begun > self.seconds:
                report(f"{rung.name}: left for the next time, {self.seconds:.0f} s are over")
                return None
            reference = first()[1]
            report(f"{rung.name}: {description(rung.name)}")
            try:
                keep(rung, *self._measure(rung, scratch / rung.name, reference))
            except UserError as error:
                failed.append(rung.name)
                return f"failed: {error}"
            return None

        for rung in recipes.climb(skip):
            if rung.skipped is not None and rung.name not in unmeasured:
                report(f"{rung.name}: skipped, {rung.skipped}")
                self._keep_skipped(rung)
        if not measured:
            known = (results.read(path).get("started_at") for path in results.files(self.folder))
            last_time = max((started[:10] for started in known if started), default="never")
            report(
                "nothing to measure: every rung has its result or its reason, from a machine like this one "
                f"(last measured {last_time}, in {self.folder.parent.name}/{self.folder.name}): --again measures anew"
            )
            return failed
        report(f"{baseline}: the baseline, second time")
        last, _ = self._measure(bottom, scratch / "last", None)
        for name, result in measured.items():
            results.write(self._path(name), with_ratio(result, baseline, first()[0], last))
        return failed

    def _measure(self, rung: recipes.Rung, scratch: Path, reference: Path | None) -> tuple[dict[str, Any], Path]:
        """Result and image of one fresh process.

        Raises:
            UserError: with what it printed last.
        """
        scratch.mkdir(exist_ok=True)
        job = replace(
            self.template,
            name=rung.name,
            parent=rung.parent,
            recipe=rung.recipe,
            result=scratch / "result.json",
            image=scratch / "image.png",
            reference=reference,
            trace=scratch / _TRACE if self.trace_reports else self.template.trace,
            # Built anew unless said otherwise: what building takes is a result too.
            cache_dir=self.template.cache_dir or (scratch / "packages" if self.template.build_packages else None),
        )
        fresh_process.run(rung.name, "benchmark.measure", job.to_json(), scratch, self.debug)
        return results.read(job.result), job.image

    def _request(self) -> dict[str, Any]:
        return self.template.request.to_dict()

    def _path(self, name: str) -> Path:
        return self.folder / results.file_name(name, vars(self.template.request))

    def _keep(self, name: str, result: dict[str, Any], image: Path) -> dict[str, Any]:
        path = self._path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        side = THUMBNAIL_OF_NOISE if checkpoints.is_random(result["checkpoint"]) else THUMBNAIL
        # The image first: a result that is there is complete.
        with Image.open(image) as full, replacing(path.with_suffix(".png")) as temporary:
            full.thumbnail((side, side))
            full.save(temporary)
        results.write(path, result)
        return result

    def _keep_report(self, rung: recipes.Rung, trace: Path) -> None:
        path = self.folder / "traces" / self._path(rung.name).with_suffix(".md").name
        path.parent.mkdir(parents=True, exist_ok=True)
        found = trace_report(load(trace), DENOISING_LOOP if rung.recipe.loop_graph else DENOISING_STEP)
        write_text(path, markdown.document(f"{rung.name}, one call", tables.report_tables(found)))

    def _keep_skipped(self, rung: recipes.Rung) -> None:
        path = self._path(rung.name)
        recipe = {"name": rung.name, "hash": rung.recipe.hash, "parent": rung.parent, **rung.recipe.to_dict()}
        about: dict[str, Any] = {"recipe": recipe, "checkpoint": self.template.checkpoint, "skipped": rung.skipped}
        about["request"] = self._request()
        if path.exists() and _same_skip(results.read(path), about):
            return
        where = environment.capture(torch.device(self.template.device), self.template.commit)
        results.write(path, {**about, "environment": where, "command": self.template.command})

    def _is_kept(self, rung: recipes.Rung, baseline: str) -> bool:
        """Whether the rung was measured on this machine, with this recipe, parent and baseline, and isn't to be again.

        A folder of results is named after a kind of machine: another processor of as many cores measures for itself.
        """
        path = self._path(rung.name)
        if self.again or not path.exists():
            return False
        result = results.read(path)
        same = (result["recipe"]["hash"], result["recipe"]["parent"]) == (rung.recipe.hash, rung.parent)
        here, there = environment.capture(torch.device(self.template.device)), result["environment"]
        same = same and all(here[name] == there[name] for name in ("device", "torch", "diffusers", "torchao"))
        same = same and result["checkpoint"] == self.template.checkpoint and result["request"] == self._request()
        ratio = result.get("ratio_to_baseline")
        return same and ratio is not None and ratio["baseline"] == baseline


def with_ratio(result: dict[str, Any], baseline: str, *measurements: dict[str, Any]) -> dict[str, Any]:
    """`result` with its speed relative to the baseline's measurements of the same invocation, pooled.

    The baseline itself is 1 by definition; how its two measurements differ stands in `baseline_medians`. Until the
    second one, and for good where the ladder was stopped before it, `baseline_timed` says that there was one.
    """
    runs = [seconds for measurement in measurements for seconds in measurement["latency_s"]["runs"]]
    ratio: dict[str, Any] = bootstrap_ratio(runs, result["latency_s"]["runs"])
    if result["recipe"]["name"] == baseline:
        ratio = {"value": 1.0, "low": 1.0, "high": 1.0}
    ratio["baseline_medians"] = [measurement["latency_s"]["median"] for measurement in measurements]
    ratio["baseline_timed"] = ONCE if len(measurements) == 1 else "at the beginning and at the end"
    return {**result, "ratio_to_baseline": {**ratio, "baseline": baseline, "baseline_runs": runs}}


def command_text() -> str:
    """The command as it was given, with no path of the program."""
    spec = sys.modules["__main__"].__spec__  # of `python -m`
    program = [Path(sys.argv[0]).name] if spec is None else ["-m", spec.name.removesuffix(".__main__")]
    return shlex.join(["python", *program, *sys.argv[1:]])


def _same_skip(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether both leave out the same recipe for the same reason; its hash has no part in fields that came since."""
    keys = ("checkpoint", "request", "skipped")
    recipes_same = all(one["recipe"][key] == other["recipe"][key] for key in ("name", "hash", "parent"))
    return recipes_same and all(one.get(key) == other.get(key) for key in keys)
