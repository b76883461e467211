"""Full-reference metrics: a clip beside the dense one, a score for each frame."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from diffusers_accel.evals.metrics.metric import PerClipMetric, Scored

# (reference, frames), both [F, H, W, 3] float32 in 0..1 -> [F] float64
FrameScore = Callable[[np.ndarray, np.ndarray], np.ndarray]


@dataclass(frozen=True, kw_only=True)
class FrameMetric(PerClipMetric[FrameScore]):
    """A score per frame against the same frame of the dense clip. A frame without a finite score counts as identical: it is
    left out of the clip's mean, and the note says how many were."""

    kind: ClassVar[str] = "frames"
    about: ClassVar[str] = (
        "Quality is measured on raw float frames against the dense frames of the first run, never on compressed video: per "
        "frame, averaged over the frames of a clip, then over clips."
    )
    scores_dense: ClassVar[bool] = False

    def refuses(self, frames: np.ndarray, dense: np.ndarray | None) -> str | None:
        assert dense is not None  # it does not score dense
        if dense.shape != frames.shape:
            return f"the dense clip is {list(dense.shape)}, the patched one {list(frames.shape)}"
        return super().refuses(frames, dense) or super().refuses(dense, None)

    def measured(self, score: FrameScore, frames: np.ndarray, dense: np.ndarray | None) -> Scored:
        assert dense is not None
        values = score(dense, frames)
        finite = values[np.isfinite(values)]
        if finite.size == 0:
            return None, "identical"
        left_out = values.size - finite.size
        note = f"{left_out} of {values.size} frames identical, left out" if left_out else None
        return float(finite.mean()), note


def per_frame(score: Callable[[np.ndarray, np.ndarray], float]) -> FrameScore:
    """A score of one frame, applied to every frame of a clip."""
    return lambda reference, frames: np.array([score(a, b) for a, b in zip(reference, frames, strict=True)], np.float64)
