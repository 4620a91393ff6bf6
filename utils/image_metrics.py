"""How much two images differ."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

# What `difference` gives for equal images.
SAME: dict[str, Any] = {"max_abs": 0, "psnr_db": None, "ssim": 1.0}


def difference(image: Image.Image, reference: Image.Image) -> dict[str, Any]:
    """max_abs in 0..255, PSNR in dB (null for equal images), SSIM (Wang et al. 2004; 1 for equal images)."""
    a, b = np.asarray(image), np.asarray(reference)
    max_abs = int(np.abs(a.astype(int) - b.astype(int)).max())
    psnr = peak_signal_noise_ratio(b, a) if max_abs else math.inf
    return {
        "max_abs": max_abs,
        "psnr_db": round(float(psnr), 2) if math.isfinite(psnr) else None,
        "ssim": round(float(structural_similarity(b, a, channel_axis=2)), 5),
    }
