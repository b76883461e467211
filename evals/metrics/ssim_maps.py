"""Structural similarity (Wang, Bovik, Sheikh, Simoncelli 2004) with any separable window, in torch, on the frames' device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

K1, K2 = 0.01, 0.03  # of the paper


def similarity(x: Tensor, y: Tensor, window: Sequence[float], sample: bool = False) -> Tensor:
    """Mean SSIM of values in 0..1 over the windows that lie inside, and over the channels.

    Args:
        x, y: [H, W, C] float64, H and W at least the window's length.
        window: weights along one side, which add up to 1.
        sample: whether variances are those of a sample, with n - 1 below, as they are without weights in scikit-image.
    """
    mx, my = _means(x, window), _means(y, window)
    count = len(window) ** 2
    scale = count / (count - 1) if sample else 1.0
    vx = scale * (_means(x * x, window) - mx * mx)
    vy = scale * (_means(y * y, window) - my * my)
    vxy = scale * (_means(x * y, window) - mx * my)
    luminance = (2 * mx * my + K1**2) / (mx * mx + my * my + K1**2)
    return (luminance * (2 * vxy + K2**2) / (vx + vy + K2**2)).mean()


def _means(x: Tensor, window: Sequence[float]) -> Tensor:
    """Weighted means of the windows that lie inside, as sums of moved views: a float64 convolution takes five times as long."""
    for side in (0, 1):
        length = x.shape[side] - len(window) + 1
        total = torch.zeros_like(x.narrow(side, 0, length))
        for start, weight in enumerate(window):
            total.add_(x.narrow(side, start, length), alpha=weight)
        x = total
    return x
