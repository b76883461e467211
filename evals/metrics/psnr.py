"""Peak signal-to-noise ratio of each frame, and the mean of these over the clip.

What SVG, FastVideo and cache-dit print as PSNR. It is never lower than that of the whole clip, `psnr_pooled`.

Unit: dB. Range: 0 upwards; identical frames have none.
"""

from __future__ import annotations

from torch import Tensor

from diffusers_accel.evals.metrics.frame_metric import FrameMetric, FrameScore, per_frame


def psnr(reference: Tensor, frame: Tensor) -> Tensor:
    """`10 log10(1 / MSE)` of values in 0..1 of any shape; infinite where they are identical."""
    return -10 * (reference - frame).square().mean().log10()


def _load() -> FrameScore:
    return per_frame(psnr)


PSNR = FrameMetric(
    name="psnr",
    title="Frame-mean PSNR",
    unit="dB",
    range="0 upwards",
    better="higher",
    protocol="per frame, over all pixels and channels, data range 1, equal to scikit-image; identical frames, which have no "
    "finite PSNR, are left out of the mean and counted.",
    comparable="SVG, FastVideo and cache-dit, who take the mean over frames too, of films of 8 bits",
    load=_load,
    digits=2,
)
