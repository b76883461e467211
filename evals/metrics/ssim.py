"""Structural similarity (Wang et al. 2004), by scikit-image."""

from __future__ import annotations

import numpy as np

from diffusers_accel.evals.metrics.frame_metric import FrameMetric, FrameScore, per_frame

WINDOW = 7


def _load() -> FrameScore:
    from skimage.metrics import structural_similarity

    def ssim(reference: np.ndarray, frame: np.ndarray) -> float:
        return float(structural_similarity(reference, frame, win_size=WINDOW, channel_axis=-1, data_range=1.0))

    return per_frame(ssim)


SSIM = FrameMetric(
    name="ssim",
    title="SSIM",
    unit="",
    range="-1 to 1",
    better="higher",
    protocol=f"scikit-image, per frame, uniform {WINDOW} x {WINDOW} window, mean over the colour channels, data range 1; 1 "
    "is identical.",
    smallest=WINDOW,
    load=_load,
    packages=("scikit-image",),
)
