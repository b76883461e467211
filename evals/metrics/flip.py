"""FLIP (Andersson et al. 2020, HPG): how visible the difference of two pictures is that are shown in turn, by NVIDIA's package.

The mean over pixels of the error map of LDR-FLIP, seen at 67 pixels per degree: a screen of 0.7 m and 3840 pixels, from 0.7 m.

Unit: none. Range: 0, which is identical, to 1; black beside white gets 0.967.
"""

from __future__ import annotations

import numpy as np

from diffusers_accel.evals.metrics.frame_metric import FrameMetric, FrameScore
from diffusers_accel.evals.metrics.metric import MetricUnavailable
from diffusers_accel.extras import install


def _load() -> FrameScore:
    try:
        from flip_evaluator import evaluate
    except ImportError as error:
        raise MetricUnavailable(f"{error}: {install('metrics')}") from error

    def score(reference: np.ndarray, frames: np.ndarray) -> np.ndarray:
        pairs = zip(reference.clip(0, 1), frames.clip(0, 1), strict=True)
        return np.array([evaluate(*pair, "LDR", applyMagma=False)[1] for pair in pairs], np.float64)

    return score


FLIP = FrameMetric(
    name="flip",
    title="FLIP",
    unit="",
    range="0 to 1",
    better="lower",
    protocol="flip-evaluator, LDR-FLIP (Andersson et al. 2020), per frame, mean of the error map at its default of 67 pixels per "
    "degree; 0 is identical.",
    comparable="any mean LDR-FLIP at 67 pixels per degree, which is the default of NVIDIA's programs",
    load=_load,
    packages=("flip-evaluator",),
    needs="the extra `metrics`",
)
