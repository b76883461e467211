"""Peak signal-to-noise ratio of a whole clip: of the mean squared error over all its frames.

Never higher than the mean of the frames' own (`psnr`), by Jensen's inequality: bad frames weigh more. The two are not to be
compared with each other.

Unit: dB. Range: 0 upwards; identical clips have none.
"""

from __future__ import annotations

import math

import numpy as np
from torch import Tensor

from diffusers_accel.evals.metrics.frame_metric import FrameMetric, FrameScore, per_frame


def _squared_error(reference: Tensor, frame: Tensor) -> Tensor:
    return (reference - frame).square().mean()


def pooled(errors: np.ndarray) -> float:
    """PSNR in dB of frames with these mean squared errors [F], of values in 0..1."""
    error = float(errors.mean())
    return -10 * math.log10(error) if error else math.inf


def _load() -> FrameScore:
    return per_frame(_squared_error)


PSNR_POOLED = FrameMetric(
    name="psnr_pooled",
    title="Pooled PSNR",
    unit="dB",
    range="0 upwards",
    better="higher",
    protocol="of the mean squared error over all frames, pixels and channels of a clip, data range 1, equal to scikit-image on "
    "the whole clip; identical frames count as error 0.",
    comparable="of a whole clip's error only; none of those that print a mean over frames (SVG, FastVideo, cache-dit)",
    load=_load,
    over_frames=pooled,
    digits=2,
)
