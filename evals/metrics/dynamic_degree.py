"""How much moves in a clip: of the fastest twentieth of the pixels, how far they go from a frame to the next.

After the dynamic degree of VBench (Huang et al. 2023), which asks RAFT whether that is above a threshold, yes or no, at 8 frames
a second. Ours is the length itself, by OpenCV's DIS flow, between all neighbouring frames: no weights, and small changes show.

Unit: shares of the frame's shorter side. Range: 0 (a still image) upwards.
"""

from __future__ import annotations

import numpy as np

from diffusers_accel.evals.metrics import flow
from diffusers_accel.evals.metrics.clip_metric import ClipMetric, ClipScore

FASTEST = 0.05  # share of the pixels


def _load() -> ClipScore:
    estimate = flow.load()
    return lambda frames: float(np.mean([fastest(estimate(a, b)) for a, b in flow.neighbours(frames)]))


def fastest(found: np.ndarray) -> float:
    """Mean length of the longest `FASTEST` of a flow [H, W, 2], in shares of the shorter side."""
    lengths = np.sort(np.hypot(found[..., 0], found[..., 1]), axis=None)
    return float(lengths[-max(1, round(FASTEST * lengths.size)) :].mean()) / min(found.shape[:2])


DYNAMIC_DEGREE = ClipMetric(
    name="dynamic_degree",
    title="Dynamic degree (DIS flow)",
    unit="share",
    range="0 upwards",
    better="closer",
    protocol="mean length of the fastest 5 % of OpenCV's DIS flow between neighbouring frames, in shares of the shorter side, "
    "over pairs; ours, not VBench's, which is a yes or no by RAFT. 0 is a still image.",
    comparable="none: VBench's is a yes or no by another flow (`vbench_dynamic_degree`)",
    smallest=flow.SMALLEST,
    fewest=2,
    load=_load,
    packages=("opencv-python-headless",),
    needs="the extra `metrics`",
)
