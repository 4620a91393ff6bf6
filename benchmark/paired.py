"""What can be said of two recipes that drew the same prompts from the same noise, a few images each.

The images of one prompt are not independent, so prompts are what is resampled (a cluster bootstrap), and a difference
is taken prompt by prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


def bootstrap_mean(values: Sequence[float] | np.ndarray, draws: int = 10_000) -> dict[str, float]:
    """Mean with its 95 % percentile bootstrap interval (Efron 1979), of one value a cluster.

    The seed is fixed: the same values give the same interval. Values that are all equal give one without width.
    """
    sample = np.asarray(values, dtype=float)
    drawn = np.random.default_rng(0).integers(len(sample), size=(draws, len(sample)))
    low, high = np.percentile(sample[drawn].mean(axis=1), (2.5, 97.5))
    return {"value": float(sample.mean()), "low": float(low), "high": float(high)}


def accuracies(right: np.ndarray, reference: np.ndarray | None, categories: Sequence[str]) -> dict[str, Any]:
    """By category, and over "all": the share of images that are right, and how it differs from the reference's.

    right, reference: bool [prompts, images a prompt]; categories: one a prompt. `accuracy` is a share,
    `difference_points` the difference in percentage points; `gained` and `lost` count the images that are right in
    `right` alone and in `reference` alone.
    """
    table: dict[str, Any] = {}
    for name in (*dict.fromkeys(categories), "all"):
        rows = [i for i, category in enumerate(categories) if name in (category, "all")]
        own = right[rows]
        table[name] = {"right": int(own.sum()), "of": own.size, "accuracy": bootstrap_mean(own.mean(axis=1))}
        if reference is not None:
            other = reference[rows]
            table[name] |= {
                "difference_points": bootstrap_mean(100 * (own.mean(axis=1) - other.mean(axis=1))),
                "gained": int((own & ~other).sum()),
                "lost": int((other & ~own).sum()),
            }
    return table


def by_place(images: np.ndarray, batch: int, parts: int = 5) -> list[int]:
    """How many of `images`, bool [prompts, images a prompt], stand in the first fifth of their batch, the second, ...

    As they were drawn: every prompt's first one, then every prompt's second one, in batches of `batch`.
    """
    place = np.arange(images.size) % batch
    counts = np.bincount(place[images.T.ravel()] * parts // batch, minlength=parts)
    return [int(count) for count in counts]


def image_differences(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Median and worst tenth of `image_metrics.difference`s, and how many images were equal.

    The values are images' own, not interpolated; PSNR is null where it is that of equal images.
    """
    psnr = [np.inf if one["psnr_db"] is None else one["psnr_db"] for one in found]
    ssim = [one["ssim"] for one in found]
    return {
        "psnr_db": {name: value if np.isfinite(value) else None for name, value in _low_half(psnr).items()},
        "ssim": _low_half(ssim),
        "equal": sum(one["max_abs"] == 0 for one in found),
    }


def _low_half(values: Sequence[float]) -> dict[str, float]:
    p10, median = np.percentile(values, (10, 50), method="lower")
    return {"median": float(median), "p10": float(p10)}
