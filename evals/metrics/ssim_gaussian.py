"""Structural similarity with the Gaussian window of its paper (Wang et al. 2004): 11 x 11, standard deviation 1.5.

Unit: none. Range: -1 to 1, which is identical.
"""

from __future__ import annotations

import math
from functools import partial

from diffusers_accel.evals.metrics.frame_metric import FrameMetric, FrameScore, per_frame
from diffusers_accel.evals.metrics.ssim_maps import similarity

SIDE, SIGMA = 11, 1.5


def window() -> tuple[float, ...]:
    """The weights along one side."""
    weights = [math.exp(-((i - SIDE // 2) ** 2) / (2 * SIGMA**2)) for i in range(SIDE)]
    return tuple(weight / sum(weights) for weight in weights)


def _load() -> FrameScore:
    return per_frame(partial(similarity, window=window()))


SSIM_GAUSSIAN = FrameMetric(
    name="ssim_gaussian",
    title="Gaussian 11x11 SSIM",
    unit="",
    range="-1 to 1",
    better="higher",
    protocol=f"per frame, Gaussian {SIDE} x {SIDE} window of standard deviation {SIGMA} inside the frame (Wang et al. 2004), "
    "mean over the colour channels, data range 1, equal to scikit-image with these settings; 1 is identical.",
    smallest=SIDE,
    comparable="FastVideo's `ssim` and others by pytorch-msssim, whose window it is; none by scikit-image's default",
    load=_load,
)
