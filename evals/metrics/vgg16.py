"""The features of VGG16 (Simonyan, Zisserman 2015) that LPIPS and DISTS compare."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

STAGES = (2, 2, 3, 3, 3)  # convolutions of 3 x 3 in each, and a pool before each but the first
# Frames in -1..1 to the range of the network's training; these constants belong to the published weights.
SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)


def normalised(x: Tensor) -> Tensor:
    """Frames [N, 3, H, W] in -1..1 as networks of ImageNet take them."""
    shift, scale = (torch.tensor(values, device=x.device).view(1, 3, 1, 1) for values in (SHIFT, SCALE))
    return (x - shift) / scale


def max_pool(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 2)


def features(x: Tensor, weights: Mapping[str, Tensor], pool: Callable[[Tensor], Tensor] = max_pool) -> list[Tensor]:
    """The last ReLU outputs of the five stages, of frames [N, 3, H, W] in -1..1, H and W at least 16.

    Args:
        weights: conv{i}.weight [out, in, 3, 3] and conv{i}.bias [out] for i in 0..12.
    """
    x, outputs, i = normalised(x), [], 0
    for stage, count in enumerate(STAGES):
        x = pool(x) if stage else x
        for _ in range(count):
            x = F.relu(F.conv2d(x, weights[f"conv{i}.weight"], weights[f"conv{i}.bias"], padding=1))
            i += 1
        outputs.append(x)
    return outputs
