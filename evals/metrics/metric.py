"""What a quality metric is: a name, a direction, and a score per frame."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

# (reference, frames), both [F, H, W, 3] float32 in 0..1 -> [F] float64
Score = Callable[[np.ndarray, np.ndarray], np.ndarray]


class MetricUnavailable(RuntimeError):
    """The metric cannot be computed here; the message says why and what to do."""


@dataclass(frozen=True)
class Metric:
    """A full-reference metric of frames.

    Attributes:
        name: key in `METRICS` and in reports.
        title: as the field writes it.
        unit: "" for a plain number.
        better: the direction.
        protocol: one sentence on how it is computed and on its range.
        smallest: least height and width in pixels.
        load: gives the score function; raises MetricUnavailable. Called once per report, before any clip is made.
    """

    name: str
    title: str
    unit: str
    better: Literal["higher", "lower"]
    protocol: str
    smallest: int
    load: Callable[[], Score]

    def refuses(self, frames: np.ndarray) -> str | None:
        """Why clips of this shape cannot be scored, or None."""
        height, width = frames.shape[1:3]
        if min(height, width) < self.smallest:
            return f"{self.title} needs frames of at least {self.smallest} x {self.smallest} pixels, found {height} x {width}"
        return None


def per_frame(score: Callable[[np.ndarray, np.ndarray], float]) -> Score:
    """A score of one frame, applied to every frame of a clip."""
    return lambda reference, frames: np.array([score(a, b) for a, b in zip(reference, frames, strict=True)], np.float64)


def score_clip(
    metric: Metric, score: Score | str, reference: np.ndarray, frames: np.ndarray
) -> tuple[float | None, str | None]:
    """Mean over the frames that have a finite score, and a note about the others."""
    if isinstance(score, str):
        return None, f"not measured: {score}"
    if reference.shape != frames.shape:
        return None, f"not measured: the dense clip is {list(reference.shape)}, the patched one {list(frames.shape)}"
    if reason := metric.refuses(frames):
        return None, f"not measured: {reason}"
    if not np.isfinite(frames).all() or not np.isfinite(reference).all():
        return None, "not measured: the frames hold NaN or infinite values"
    values = score(reference, frames)
    finite = values[np.isfinite(values)]
    if finite.size == 0:
        return None, "identical"
    note = (
        None
        if finite.size == values.size
        else f"{values.size - finite.size} of {values.size} frames identical, left out"
    )
    return float(finite.mean()), note
