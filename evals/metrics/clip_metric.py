"""Metrics of a single clip, such as flicker or motion. Dense clips are scored too, so that the change from dense can be shown."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from diffusers_accel.evals.metrics.metric import PerClipMetric, Scored, not_measured

ClipScore = Callable[[np.ndarray], float]  # [F, H, W, 3] float32 in 0..1


@dataclass(frozen=True, kw_only=True)
class ClipMetric(PerClipMetric[ClipScore]):
    """One number for one clip, which is looked at alone."""

    kind: ClassVar[str] = "one clip"
    about: ClassVar[str] = (
        "These look at one clip alone, on raw float frames, and at the dense clips of the first run too; a change from dense is "
        "the mean of the differences clip by clip."
    )

    def measured(self, score: ClipScore, frames: np.ndarray, dense: np.ndarray | None) -> Scored:
        value = float(score(frames))
        return (value, None) if math.isfinite(value) else not_measured(f"{self.title} of this clip is {value}")
