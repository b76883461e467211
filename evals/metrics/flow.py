"""Optical flow of neighbouring frames by OpenCV's DIS (Kroeger et al. 2016, ECCV), which needs no weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from diffusers_accel.evals.metrics.metric import MetricUnavailable
from diffusers_accel.extras import install

SMALLEST = 32  # pixels a side, below which there are too few patches to match
Flow = Callable[
    [np.ndarray, np.ndarray], np.ndarray
]  # two frames [H, W, 3] in 0..1 -> where each pixel goes to [H, W, 2]: x, y


def load() -> Flow:
    """Raises MetricUnavailable without OpenCV."""
    try:
        import cv2
    except ImportError as error:
        raise MetricUnavailable(f"{error}: {install('metrics')}") from error
    estimator = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)

    def grey(frame: np.ndarray) -> np.ndarray:
        return cv2.cvtColor((frame.clip(0, 1) * 255).round().astype(np.uint8), cv2.COLOR_RGB2GRAY)

    return lambda a, b: estimator.calc(grey(a), grey(b), None)


def neighbours(frames: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Each frame with the next one."""
    return zip(frames[:-1], frames[1:], strict=True)
