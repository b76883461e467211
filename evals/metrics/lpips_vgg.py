"""LPIPS (Zhang et al. 2018, arXiv 1801.03924) with VGG16 instead of AlexNet, version 0.1: another number, see `lpips`.

Unit: none. Range: 0, which is identical, upwards.
"""

from __future__ import annotations

from diffusers_accel.evals.metrics import lpips, lpips_weights
from diffusers_accel.evals.metrics.frame_metric import FrameMetric, FrameScore
from diffusers_accel.evals.metrics.vgg16 import features

BATCH = 1  # frames at a time: the features of a frame of 720p take a gigabyte


def _load() -> FrameScore:
    weights = lpips.weights_of("vgg16", "lpips_vgg")
    return lpips.scorer(lambda a, b: lpips.distance(a, b, weights, features), BATCH)


LPIPS_VGG = FrameMetric(
    name="lpips_vgg",
    title="LPIPS VGG",
    unit="",
    range="0 upwards",
    better="lower",
    protocol="VGG16, version 0.1 (Zhang et al. 2018), on -1 to 1, per frame, at the clip's own size; 0 is identical.",
    comparable="others by VGG on -1 to 1, as Zhang et al. feed it; not SVG's, which feeds it with 0 to 1",
    smallest=32,
    load=_load,
    needs="`diffusers-accel metrics fetch lpips_vgg` (64 MB)",
    fetch=lpips_weights.fetch,
)
