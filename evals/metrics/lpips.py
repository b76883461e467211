"""Learned perceptual image patch similarity (Zhang et al. 2018, arXiv 1801.03924), AlexNet version 0.1.

Frames go through AlexNet; each of its five ReLU outputs is scaled to unit length along the channels, the squared
differences are weighted per channel by the published linear heads, averaged over positions and added up. The `lpips` package
is used where it works; otherwise the same arithmetic runs here on the same published weights, without torchvision.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from diffusers_accel.evals.metrics import lpips_weights
from diffusers_accel.evals.metrics.frame_metric import FrameMetric, FrameScore

BATCH = 16  # frames at a time
# AlexNet's convolutions as (stride, padding, whether a 3 x 3 max pool of stride 2 comes first).
CONVOLUTIONS = ((4, 2, False), (1, 2, True), (1, 1, True), (1, 1, False), (1, 1, False))
# Frames in -1..1 to the range of the network's training; these constants belong to the published weights.
SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)


def distance(reference: Tensor, frames: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
    """LPIPS of `[N, 3, H, W]` pairs in -1..1: `[N]`, 0 for identical frames.

    Args:
        weights: conv{i}.weight [out, in, h, w], conv{i}.bias [out] and head{i}.weight [out] for i in 0..4, float32.
    """
    total = torch.zeros(len(frames))
    for i, (a, b) in enumerate(zip(_features(reference, weights), _features(frames, weights), strict=True)):
        head = weights[f"head{i}.weight"].view(1, -1, 1, 1)
        total += ((_unit(a) - _unit(b)).square() * head).sum(1).mean((1, 2))
    return total


def _features(x: Tensor, weights: Mapping[str, Tensor]) -> list[Tensor]:
    x = (x - torch.tensor(SHIFT).view(1, 3, 1, 1)) / torch.tensor(SCALE).view(1, 3, 1, 1)
    outputs = []
    for i, (stride, padding, pool) in enumerate(CONVOLUTIONS):
        x = F.max_pool2d(x, 3, 2) if pool else x
        x = F.relu(F.conv2d(x, weights[f"conv{i}.weight"], weights[f"conv{i}.bias"], stride, padding))
        outputs.append(x)
    return outputs


def _unit(x: Tensor) -> Tensor:
    return x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10)


def scorer(pair_distance: Callable[[Tensor, Tensor], Tensor]) -> FrameScore:
    """A score of clips from a distance of `[N, 3, H, W]` pairs in -1..1."""

    @torch.no_grad()
    def score(reference: np.ndarray, frames: np.ndarray) -> np.ndarray:
        pairs = [
            torch.from_numpy(np.ascontiguousarray(x)).permute(0, 3, 1, 2).float() * 2 - 1 for x in (reference, frames)
        ]
        parts = [pair_distance(a, b).flatten() for a, b in zip(*(x.split(BATCH) for x in pairs), strict=True)]
        return torch.cat(parts).double().numpy()

    return score


def _load() -> FrameScore:
    try:
        import lpips as package

        return scorer(package.LPIPS(net="alex", verbose=False).eval())
    except (
        Exception
    ):  # it needs torchvision, which raises more than ImportError beside a CPU build of torch, and a download
        weights = lpips_weights.load()
        return scorer(lambda a, b: distance(a, b, weights))


LPIPS = FrameMetric(
    name="lpips",
    title="LPIPS",
    unit="",
    range="0 upwards",
    better="lower",
    protocol="AlexNet, version 0.1 (Zhang et al. 2018), per frame, at the clip's own size; 0 is identical.",
    smallest=32,
    comparable="cache-dit's default and others by AlexNet on -1 to 1; none by VGG, such as SVG's, which feeds VGG with 0 to 1",
    load=_load,
    packages=("lpips",),
    needs="weights, fetched once (64 MB), or the extra `lpips`",
)
