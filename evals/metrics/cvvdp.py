"""ColorVideoVDP (Mantiuk et al. 2024, SIGGRAPH): how different a clip looks from the dense one on a display, by its authors.

It models contrast, colour and time: flicker counts, and what detail masks does not. Of the clip as a whole.

Unit: JOD, just objectionable differences: one less, and three of four people prefer the other clip. Range: up to 10, which is
identical.
"""

from __future__ import annotations

import numpy as np
import torch

from diffusers_accel.evals.metrics.frame_metric import FrameMetric, FrameScore, device
from diffusers_accel.evals.metrics.metric import MetricUnavailable
from diffusers_accel.extras import install

DISPLAY = "standard_4k"  # the package's own default
RATE = 25  # frames a second


def _load() -> FrameScore:
    try:
        from pycvvdp import cvvdp
    except (ImportError, RuntimeError) as error:  # torchvision beside another torch than its own raises the latter
        raise MetricUnavailable(f"{error}: {install('cvvdp')}") from error
    model = cvvdp(display_name=DISPLAY, device=device(), quiet=True)

    @torch.no_grad()
    def score(reference: np.ndarray, frames: np.ndarray) -> np.ndarray:
        clips = (torch.from_numpy(clip.clip(0, 1)).to(device()) for clip in (frames, reference))
        found, _ = model.predict(*clips, dim_order="FHWC", frames_per_second=RATE)
        return np.array([float(found)], np.float64)

    return score


CVVDP = FrameMetric(
    name="cvvdp",
    title="ColorVideoVDP",
    unit="JOD",
    range="up to 10",
    better="higher",
    protocol=f"the package cvvdp (Mantiuk et al. 2024), of the whole clip at {RATE} frames a second, on its display {DISPLAY}; "
    "10 is identical.",
    comparable=f"others by cvvdp for the display {DISPLAY} at the same size and frame rate",
    load=_load,
    packages=("cvvdp",),
    needs="the extra `cvvdp`, for long clips a GPU",
    digits=2,
)
