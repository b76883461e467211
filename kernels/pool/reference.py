"""What pooling means, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from diffusers_accel.kernels.pattern import block_lengths


def refuses(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why this implementation cannot run there, or None."""
    return None if dtype.is_floating_point else f"needs a floating-point dtype, found {dtype}"


def pool(x: Tensor, block: int, valid: Tensor | None) -> Tensor:
    """Mean over the existing tokens of each block, summed in fp32."""
    lengths = block_lengths(x.shape[1], block, valid, x.device)
    x = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, len(lengths) * block - x.shape[1]))
    x = x.unflatten(1, (len(lengths), block))
    if valid is not None:
        missing = torch.arange(block, device=x.device) >= lengths[:, None]
        x = x.masked_fill(missing[..., None, None], 0)
    return x.sum(2, dtype=torch.float32) / lengths.clamp(min=1)[:, None, None]
