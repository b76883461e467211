"""Multi-scale structural similarity (Wang, Simoncelli, Bovik 2003, Asilomar), by the `pytorch-msssim` package.

Contrast and structure on five scales, each half the one before, and luminance on the last, multiplied with the exponents of the
paper; on each scale an 11 x 11 Gaussian window of standard deviation 1.5 without padding, so that the smallest side must be
longer than 10 * 2^4 = 160 pixels. A scale whose mean is negative counts as 0.

Unit: none. Range: 0 to 1, which is identical.
"""

from __future__ import annotations

import numpy as np
import torch

from diffusers_accel.evals.metrics.frame_metric import FrameMetric, FrameScore, device
from diffusers_accel.evals.metrics.metric import MetricUnavailable
from diffusers_accel.extras import install

BATCH = 4  # frames at a time, which bounds the memory


def _load() -> FrameScore:
    try:
        from pytorch_msssim import ms_ssim
    except ImportError as error:
        raise MetricUnavailable(f"{error}: {install('eval')}") from error

    @torch.no_grad()
    def score(reference: np.ndarray, frames: np.ndarray) -> np.ndarray:
        clips = (torch.from_numpy(np.ascontiguousarray(x)).split(BATCH) for x in (reference, frames))
        batches = ([x.to(device()).permute(0, 3, 1, 2).float() for x in pair] for pair in zip(*clips, strict=True))
        found = [ms_ssim(a, b, data_range=1.0, size_average=False) for a, b in batches]
        return torch.cat(found).double().cpu().numpy()

    return score


MS_SSIM = FrameMetric(
    name="ms_ssim",
    title="MS-SSIM",
    unit="",
    range="0 to 1",
    better="higher",
    protocol="pytorch-msssim, per frame, five scales with the exponents of Wang et al. 2003, Gaussian 11 x 11 window without "
    "padding, mean over the colour channels, data range 1; 1 is identical.",
    smallest=161,
    comparable="FastVideo and SGLang, who use pytorch-msssim in their tests of whole models",
    load=_load,
    packages=("pytorch-msssim",),
)
