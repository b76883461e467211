"""XPSNR (Helmrich et al. 2020, ICASSP), by the xpsnr filter of the ffmpeg program that `imageio-ffmpeg` brings.

PSNR with each block's squared error weighted by what the eye sees of it: less where the dense clip has detail or moves. Of luma
alone, in 8 bits: the filter of ffmpeg 9.0 gives identical frames of 10 bits finite values at some widths. The first frame counts
as one that moves. On clips of fewer than 2025 pixels a frame the filter weights nothing, and it is the PSNR of luma.

Unit: dB. Range: any; errors in flat still frames can weigh so much that it is negative. Identical frames have none.
"""

from __future__ import annotations

import re

import numpy as np

from diffusers_accel.evals.metrics import ffmpeg
from diffusers_accel.evals.metrics.frame_metric import FrameMetric, FrameScore

FILTERS = f"[dense][other]xpsnr=stats_file={ffmpeg.LOG}"
LUMA = re.compile(r"^n: *\d+ +XPSNR y: *(\S+)", re.MULTILINE)


def _load() -> FrameScore:
    program = ffmpeg.find("xpsnr")
    return lambda reference, frames: luma(ffmpeg.compare(program, FILTERS, reference, frames, bits=8))


def luma(log: str) -> np.ndarray:
    """The values of luma in the filter's log, frame by frame [F]; infinite where it says so."""
    return np.array([float(value) for value in LUMA.findall(log)], np.float64)


XPSNR = FrameMetric(
    name="xpsnr",
    title="XPSNR",
    unit="dB",
    range="any",
    better="higher",
    protocol="the xpsnr filter of ffmpeg (Helmrich et al. 2020), per frame, on BT.709 luma of 8 bits at the clip's own size and "
    "25 frames a second; identical frames are left out of the mean and counted.",
    comparable="none of generated clips; of codecs, those of luma by ffmpeg at the same size",
    load=_load,
    packages=("imageio-ffmpeg",),
    needs="an ffmpeg with xpsnr, such as that of imageio-ffmpeg",
    digits=2,
)
