"""What dense attention means: attention that reads every block, as its own reference computes it."""

from __future__ import annotations

import torch
from torch import Tensor

from diffusers_accel.kernels.attention import attention, refusal


def refuses(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why this implementation cannot run there, or None."""
    return refusal("reference", device, dtype, head_dim)


def dense(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Dense attention; the arguments have been checked by the caller."""
    return attention(q, k, v, scale=scale, impl="reference")
