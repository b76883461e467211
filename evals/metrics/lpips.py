"""Learned perceptual image patch similarity (Zhang et al. 2018, arXiv 1801.03924), AlexNet version 0.1.

Frames go through AlexNet; each of its five ReLU outputs is scaled to unit length along the channels, the squared
differences are weighted per channel by the published linear heads, averaged over positions and added up. The
package `lpips` does the same on the same published weights, but needs torchvision and fetches AlexNet unasked.

Unit: none. Range: 0, which is identical, upwards.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from diffusers_accel.evals.metrics import lpips_weights
from diffusers_accel.evals.metrics.frame_metric import FrameMetric, FrameScore, device
from diffusers_accel.evals.metrics.vgg16 import normalised

Features = Callable[[Tensor, Mapping[str, Tensor]], list[Tensor]]
BATCH = 16  # frames at a time
# AlexNet's convolutions as (stride, padding, whether a 3 x 3 max pool of stride 2 comes first).
CONVOLUTIONS = ((4, 2, False), (1, 2, True), (1, 1, True), (1, 1, False), (1, 1, False))


def alexnet(x: Tensor, weights: Mapping[str, Tensor]) -> list[Tensor]:
    """The five ReLU outputs, of frames [N, 3, H, W] in -1..1."""
    x, outputs = normalised(x), []
    for i, (stride, padding, pool) in enumerate(CONVOLUTIONS):
        x = F.max_pool2d(x, 3, 2) if pool else x
        x = F.relu(F.conv2d(x, weights[f"conv{i}.weight"], weights[f"conv{i}.bias"], stride, padding))
        outputs.append(x)
    return outputs


def distance(reference: Tensor, frames: Tensor, weights: Mapping[str, Tensor], features: Features = alexnet) -> Tensor:
    """LPIPS of `[N, 3, H, W]` pairs in -1..1: `[N]`, 0 for identical frames.

    Args:
        weights: those that `features` takes, and head{i}.weight [out] for each of its outputs, float32.
    """
    total = torch.zeros(len(frames), device=frames.device)
    for i, (a, b) in enumerate(zip(features(reference, weights), features(frames, weights), strict=True)):
        head = weights[f"head{i}.weight"].view(1, -1, 1, 1)
        total += ((_unit(a) - _unit(b)).square() * head).sum(1).mean((1, 2))
    return total


def _unit(x: Tensor) -> Tensor:
    return x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10)


def scorer(pair_distance: Callable[[Tensor, Tensor], Tensor], batch: int | None = None) -> FrameScore:
    """A score of clips from a distance of `[N, 3, H, W]` pairs in -1..1, which gets `batch` of them on `device()` at a time."""

    @torch.no_grad()
    def score(reference: np.ndarray, frames: np.ndarray) -> np.ndarray:
        clips = (torch.from_numpy(np.ascontiguousarray(x)).split(batch or BATCH) for x in (reference, frames))
        parts = [pair_distance(*(_pixels(x) for x in pair)).flatten() for pair in zip(*clips, strict=True)]
        return torch.cat(parts).double().cpu().numpy()

    return score


def _pixels(frames: Tensor) -> Tensor:
    """Frames [N, H, W, 3] in 0..1 as a network takes them."""
    return frames.to(device()).permute(0, 3, 1, 2).float() * 2 - 1


def weights_of(network: str, metric: str) -> dict[str, Tensor]:
    """The kept weights on `device()`; raises MetricUnavailable with how to get them."""
    return {name: tensor.to(device()) for name, tensor in lpips_weights.load(network, metric).items()}


def _load() -> FrameScore:
    weights = weights_of("alexnet", "lpips")
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
    needs="`diffusers-accel metrics fetch lpips` (64 MB)",
    fetch=lpips_weights.fetch,
)
