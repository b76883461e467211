"""Peak signal-to-noise ratio, by scikit-image."""

from __future__ import annotations

import math

import numpy as np

from diffusers_accel.evals.metrics.metric import Metric, Score, per_frame


def _load() -> Score:
    from skimage.metrics import peak_signal_noise_ratio

    def psnr(reference: np.ndarray, frame: np.ndarray) -> float:
        if np.array_equal(reference, frame):
            return math.inf  # scikit-image gets there by a division by zero and warns
        return float(peak_signal_noise_ratio(reference, frame, data_range=1.0))

    return per_frame(psnr)


PSNR = Metric(
    name="psnr",
    title="PSNR",
    unit="dB",
    better="higher",
    protocol="scikit-image, per frame, data range 1; identical frames, which have no finite PSNR, are left out of the mean "
    "and counted.",
    smallest=1,
    load=_load,
)
