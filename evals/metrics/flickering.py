"""Temporal flickering by the formula of VBench (Huang et al. 2023, arXiv 2311.17982, its dimension of that name).

`(255 - MAE) / 255`, where MAE is the mean absolute difference of neighbouring frames in 8-bit units, over all pixels, channels
and pairs of neighbours. It needs no weights. Computed here on raw float frames, not by VBench's program: VBench reads 8-bit
films, and asks for prompts of still scenes.

Unit: none. Range: 0 (every pixel jumps from black to white) to 1 (a still image).
"""

from __future__ import annotations

import numpy as np

from diffusers_accel.evals.metrics.clip_metric import ClipMetric, ClipScore


def flickering(frames: np.ndarray) -> float:
    """Of a clip [F, H, W, 3] in 0..1, F at least 2."""
    pairs = zip(frames[:-1], frames[1:], strict=True)  # one at a time: a clip of 720p takes gigabytes in float64
    return 1.0 - float(np.mean([np.abs(after - before).mean(dtype=np.float64) for before, after in pairs]))


def _load() -> ClipScore:
    return flickering


FLICKERING = ClipMetric(
    name="temporal_flickering",
    title="Temporal flickering",
    unit="",
    range="0 to 1",
    better="closer",
    protocol="VBench's formula (Huang et al. 2023), computed by this program on raw frames: (255 - MAE) / 255 of neighbouring "
    "frames; 1 is a still image. More than dense is less motion or less flicker, less than dense is more of one of them.",
    fewest=2,
    comparable="none: VBench's are of its own prompts and of films of 8 bits (`vbench_temporal_flickering`)",
    load=_load,
)
