"""Deep image structure and texture similarity (Ding et al. 2020, arXiv 2004.07728).

Of the pixels and of five stages of VGG16, whose pools are L2 with a Hann window: per channel how alike the means are (texture)
and how the values correlate (structure) over the whole frame, weighted by what the authors fitted to ratings.

Unit: none. Range: 0, which is identical, upwards; at most 1.13, where structures are inverted.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from diffusers_accel.evals.metrics import dists_weights, lpips
from diffusers_accel.evals.metrics.frame_metric import FrameMetric, FrameScore, device
from diffusers_accel.evals.metrics.vgg16 import features

BATCH = 1  # frames at a time: the features of a frame of 720p take a gigabyte
HANN = (0.25, 0.5, 0.25)
STABLE = 1e-6  # in both fractions


def hann_pool(x: Tensor) -> Tensor:
    """Square root of the weighted mean square of 3 x 3, at every second place."""
    side = torch.tensor(HANN, device=x.device)
    window = torch.outer(side, side).expand(x.shape[1], 1, 3, 3)
    return (F.conv2d(x.square(), window, stride=2, padding=1, groups=x.shape[1]) + 1e-12).sqrt()


def distance(reference: Tensor, frames: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
    """DISTS of `[N, 3, H, W]` pairs in -1..1: `[N]`.

    Args:
        weights: those of `vgg16.features`, and alpha [C] and beta [C] of textures and of structures, for the channels of pixels
            and stages one after the other.
    """
    found = [torch.cat(_similarities(a, b), dim=1) for a, b in zip(_all(reference, weights), _all(frames, weights))]
    sizes = [each.shape[1] // 2 for each in found]
    parts = zip(weights["alpha"].split(sizes), weights["beta"].split(sizes), strict=True)
    total = weights["alpha"].sum() + weights["beta"].sum()
    similar = sum((each * torch.cat(part)).sum(1) for each, part in zip(found, parts, strict=True))
    return (1 - similar / total).clamp(min=0)  # identical frames are off by rounding


def _all(x: Tensor, weights: Mapping[str, Tensor]) -> list[Tensor]:
    return [(x + 1) / 2, *features(x, weights, hann_pool)]


def _similarities(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Of means and of structures, [N, C] each."""
    a, b = a.flatten(2), b.flatten(2)
    ma, mb = a.mean(2), b.mean(2)
    covariance = (a * b).mean(2) - ma * mb
    variances = a.var(2, correction=0) + b.var(2, correction=0)
    means = (2 * ma * mb + STABLE) / (ma.square() + mb.square() + STABLE)
    return means, (2 * covariance + STABLE) / (variances + STABLE)


def _load() -> FrameScore:
    weights = lpips.weights_of("vgg16", "dists")
    weights |= {name: tensor.to(device()) for name, tensor in dists_weights.load().items()}
    return lpips.scorer(lambda a, b: distance(a, b, weights), BATCH)


DISTS = FrameMetric(
    name="dists",
    title="DISTS",
    unit="",
    range="0 upwards",
    better="lower",
    protocol="by its authors' weights (Ding et al. 2020), per frame, at the clip's own size; 0 is identical.",
    comparable="others at the clip's own size; those of image quality first bring the shorter side to 256 pixels",
    smallest=32,
    load=_load,
    needs="`diffusers-accel metrics fetch dists` (64 MB)",
    fetch=dists_weights.fetch,
)
