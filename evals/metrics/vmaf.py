"""VMAF (Li et al. 2016, Netflix), by the libvmaf filter of the ffmpeg program that `imageio-ffmpeg` brings or finds.

The model is libvmaf's own default, vmaf_v0.6.1, which was fitted to how people rate compressed films of 1080 lines, seen from a
distance of three heights: for other sizes, and other damage than compression, its values are to be read side by side only. It
looks at luminance alone: frames become BT.709 luma of 10 bits, limited range. A frame's score depends on its neighbours
(motion).

Unit: none. Range: 0 to 100; a still clip beside itself gets 97.4, one that moves more.
"""

from __future__ import annotations

import json

import numpy as np

from diffusers_accel.evals.metrics import ffmpeg
from diffusers_accel.evals.metrics.frame_metric import FrameMetric, FrameScore

FILTERS = f"[other][dense]libvmaf=log_fmt=json:log_path={ffmpeg.LOG}"


def _load() -> FrameScore:
    program = ffmpeg.find("libvmaf")

    def score(reference: np.ndarray, frames: np.ndarray) -> np.ndarray:
        found = json.loads(ffmpeg.compare(program, FILTERS, reference, frames))["frames"]
        return np.array([frame["metrics"]["vmaf"] for frame in found], np.float64)

    return score


VMAF = FrameMetric(
    name="vmaf",
    title="VMAF",
    unit="",
    range="0 to 100",
    better="higher",
    protocol="libvmaf in ffmpeg, its default model vmaf_v0.6.1 (fitted to compressed films of 1080 lines), per frame, on BT.709 "
    "luma of 10 bits at the clip's own size; a still clip beside itself gets 97.4.",
    smallest=64,
    comparable="none of generated clips: only of the same model and size, and then as a difference between two methods",
    load=_load,
    packages=("imageio-ffmpeg",),
    needs="an ffmpeg with libvmaf, such as that of imageio-ffmpeg",
    digits=2,
)
