"""Structural similarity (Wang et al. 2004) with a uniform window: scikit-image's default.

Unit: none. Range: -1 to 1, which is identical.
"""

from __future__ import annotations

from functools import partial

from diffusers_accel.evals.metrics.frame_metric import FrameMetric, FrameScore, per_frame
from diffusers_accel.evals.metrics.ssim_maps import similarity

SIDE = 7
WINDOW = (1 / SIDE,) * SIDE


def _load() -> FrameScore:
    return per_frame(partial(similarity, window=WINDOW, sample=True))


SSIM = FrameMetric(
    name="ssim",
    title="Uniform 7x7 SSIM",
    unit="",
    range="-1 to 1",
    better="higher",
    protocol=f"per frame, uniform {SIDE} x {SIDE} window inside the frame, sample covariance, mean over the colour channels, "
    "data range 1, equal to scikit-image's default; 1 is identical.",
    smallest=SIDE,
    comparable="cache-dit and DiCache, who use scikit-image; none with a Gaussian window",
    load=_load,
)
