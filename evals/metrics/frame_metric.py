"""Full-reference metrics: a clip beside the dense one, a score for each frame."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from diffusers_accel.evals.metrics.metric import PerClipMetric, Scored

# (reference, frames), both [F, H, W, 3] float32 in 0..1 -> [F] float64; [1] of what looks at the clip as a whole
FrameScore = Callable[[np.ndarray, np.ndarray], np.ndarray]


@dataclass(frozen=True, kw_only=True)
class FrameMetric(PerClipMetric[FrameScore]):
    """A score per frame against the same frame of the dense clip. A frame without a finite score counts as identical: it is
    left out of the clip's value, and the note says how many were.

    Attributes:
        over_frames: the clip's value out of the finite ones of its frames [n], n at least 1; of frames that are all identical it
            may be infinite.
    """

    over_frames: Callable[[np.ndarray], float] = np.mean

    kind: ClassVar[str] = "frames"
    about: ClassVar[str] = (
        "Quality is measured on raw float frames against the dense frames of the first run, never on compressed video: per "
        "frame, averaged over the frames of a clip where a metric does not say otherwise, then over clips."
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
        value = float(self.over_frames(finite)) if finite.size else math.inf
        if not math.isfinite(value):
            return None, "identical"
        left_out = values.size - finite.size
        note = f"{left_out} of {values.size} frames identical, left out" if left_out else None
        return value, note


def device() -> torch.device:
    """Where frames are compared: on the GPU, where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def per_frame(score: Callable[[Tensor, Tensor], Tensor]) -> FrameScore:
    """A score of a frame beside the dense one, both [H, W, 3] float64, applied to every frame of a clip.

    It runs on the GPU where there is one, frame by frame, so that long clips take time and no memory.
    """

    @torch.no_grad()
    def scores(reference: np.ndarray, frames: np.ndarray) -> np.ndarray:
        pairs = zip(torch.from_numpy(reference), torch.from_numpy(frames), strict=True)
        found = [score(*(frame.to(device()).double() for frame in pair)) for pair in pairs]
        return torch.stack(found).cpu().numpy()

    return scores
