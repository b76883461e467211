"""Peak signal-to-noise ratio, by scikit-image."""

from __future__ import annotations

import math

import numpy as np

from diffusers_accel.evals.metrics.frame_metric import FrameMetric, FrameScore, per_frame


def _load() -> FrameScore:
    from skimage.metrics import peak_signal_noise_ratio

    def psnr(reference: np.ndarray, frame: np.ndarray) -> float:
        if np.array_equal(reference, frame):
            return math.inf  # scikit-image gets there by a division by zero and warns
        return float(peak_signal_noise_ratio(reference, frame, data_range=1.0))

    return per_frame(psnr)


PSNR = FrameMetric(
    name="psnr",
    title="PSNR",
    unit="dB",
    range="0 upwards",
    better="higher",
    protocol="scikit-image, per frame, data range 1; identical frames, which have no finite PSNR, are left out of the mean "
    "and counted.",
    load=_load,
    packages=("scikit-image",),
    digits=2,
)
