"""Which rungs don't pay, by the result files: those slower than the rung they stand on, wherever they were timed."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

from utils import checkpoints, results

_MARGIN = 1.12


def not_paying(root: Path, environment: dict[str, Any], checkpoint: str) -> frozenset[str]:
    """The rungs that the results nearest to this machine and checkpoint show not to pay; none where there are none.

    Nearest: of the same machine before others of its kind, of the same checkpoint before others of its size.

    Raises:
        UserError: a result file is damaged.
    """
    wanted = results.folder(root, environment, checkpoint)
    nearest: dict[tuple[bool, bool], list[dict[str, Any]]] = {}
    for folder in sorted(root.glob("*/*")):
        measured = [r for r in map(results.read, results.files(folder)) if "skipped" not in r]
        measured = [r for r in measured if r["environment"]["device_type"] == environment["device_type"]]
        measured = [r for r in measured if is_small(r["checkpoint"]) == is_small(checkpoint)]
        if measured:
            nearest[folder.parent == wanted.parent, folder.name == wanted.name] = measured
    return slower_than_parent(nearest[max(nearest)]) if nearest else frozenset()


def slower_than_parent(measured: list[dict[str, Any]]) -> frozenset[str]:
    """The rungs among results that are slower than their parent at every size at which both were timed.

    Slower is what noise hardly explains: the intervals of the two speed-ups lie apart, and by more than `_MARGIN`, for
    an interval covers the calls of one process, and the same work in another one was seen to take 13 % longer, on two
    cores of a processor that others use as well.
    """
    measured = [r for r in measured if r["ratio_to_baseline"] is not None]
    ratios = {(results.size(r["request"]), r["recipe"]["name"]): r["ratio_to_baseline"] for r in measured}
    slower: dict[str, list[bool]] = defaultdict(list)
    for result in measured:
        parent = ratios.get((results.size(result["request"]), result["recipe"]["parent"]))
        if parent is not None:
            slower[result["recipe"]["name"]].append(result["ratio_to_baseline"]["high"] * _MARGIN < parent["low"])
    return frozenset(name for name, at_sizes in slower.items() if all(at_sizes))


def is_small(checkpoint: str) -> bool:
    """Whether a checkpoint has the embedded model's size, as `tiny` and copies of it, and not FLUX.1's."""
    known = checkpoints.CHECKPOINTS.get(checkpoint)
    if known is None and not Path(checkpoint).is_dir():
        return False  # a folder on another machine: a finetune of FLUX.1 before anything else
    return (known or checkpoints.defaults(checkpoint)).vocabulary == "scenes"
