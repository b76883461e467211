"""What every operator on q, k and v asks of its arguments. Reads shapes, dtypes and devices, never values."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def check_qkv(q: Tensor, k: Tensor, v: Tensor) -> None:
    """q `[B, S_q, H, D]`, k and v `[B, S_k, H, D]`, of one dtype and device; else ValueError with expected and found."""
    if q.dim() != 4 or 0 in q.shape:
        raise ValueError(f"q must be [B, S, H, D] without an empty dimension, found {list(q.shape)}")
    expected = (q.shape[0], k.shape[1] if k.dim() == 4 else "S_k", *q.shape[2:])
    for name, x in (("k", k), ("v", v)):
        if tuple(x.shape) != expected or 0 in x.shape:
            raise ValueError(f"{name} must be {list(expected)} to fit q {list(q.shape)}, found {list(x.shape)}")
        if x.dtype != q.dtype or x.device != q.device:
            raise ValueError(f"{name} must be {q.dtype} on {q.device} as q is, found {x.dtype} on {x.device}")


def check_k_mean(k_mean: Tensor | None, shape: tuple[int, int, int], device: torch.device) -> None:
    """k_mean fp32 `[B, H, D]`, or None."""
    if k_mean is not None and (k_mean.shape, k_mean.dtype, k_mean.device) != (shape, torch.float32, device):
        raise ValueError(
            f"k_mean must be float32 {list(shape)} on {device}, "
            f"found {k_mean.dtype} {list(k_mean.shape)} on {k_mean.device}"
        )


def score_scale(scale: float | None, head_dim: int) -> float:
    """The factor of the scores: 1 / sqrt(D) for None; anything but a positive finite number is refused."""
    scale = head_dim**-0.5 if scale is None else float(scale)
    if not (scale > 0 and math.isfinite(scale)):
        raise ValueError(f"scale must be positive and finite, found {scale}")
    return scale
