"""Warp error (Lai et al. 2018, ECCV): how far a frame is from the next one, once what moves has been moved back.

The mean squared difference of a frame and the next one, taken at the end of each pixel's flow, over the pixels that can be
followed: flow there and back meets again (Sundaram et al. 2010), inside the frame. Ours in that OpenCV's DIS gives the flow.

Unit: none. Range: 0, where all change is motion, to 1.
"""

from __future__ import annotations

import numpy as np

from diffusers_accel.evals.metrics import flow
from diffusers_accel.evals.metrics.clip_metric import ClipMetric, ClipScore

SHARE, LEAST = 0.01, 0.5  # how far flow there and back may miss: of the two squared lengths, and in squared pixels


def _load() -> ClipScore:
    estimate = flow.load()
    return lambda frames: float(np.mean([pair_error(estimate, a, b) for a, b in flow.neighbours(frames)]))


def pair_error(estimate: flow.Flow, frame: np.ndarray, following: np.ndarray) -> float:
    """Mean squared difference over the pixels that can be followed; NaN where none can."""
    import cv2

    there, back = estimate(frame, following), estimate(following, frame)
    height, width = frame.shape[:2]
    x, y = np.meshgrid(np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32))
    x, y = x + there[..., 0], y + there[..., 1]
    warped, returned = (cv2.remap(image, x, y, cv2.INTER_LINEAR) for image in (following, back))
    missed = np.square(there + returned).sum(-1)
    lengths = np.square(there).sum(-1) + np.square(returned).sum(-1)
    inside = (x >= 0) & (x <= width - 1) & (y >= 0) & (y <= height - 1)
    followed = inside & (missed < SHARE * lengths + LEAST)
    errors = np.square(frame - warped, dtype=np.float64)[followed]
    return float(errors.mean()) if errors.size else np.nan


WARP_ERROR = ClipMetric(
    name="warp_error",
    title="Warp error (DIS flow)",
    unit="",
    range="0 to 1",
    better="closer",
    protocol="mean squared difference of neighbouring frames after Lai et al. 2018, the next one moved back by OpenCV's DIS "
    "flow, over pixels whose flow there and back meets again, then over pairs. More than dense is more change without motion.",
    comparable="none: others take the flow of a network (FlowNet2, RAFT)",
    smallest=flow.SMALLEST,
    fewest=2,
    load=_load,
    packages=("opencv-python-headless",),
    needs="the extra `metrics`",
    digits=6,
)
