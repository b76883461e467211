"""Dense attention by cuDNN, through PyTorch's operator for it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from diffusers_accel.kernels.dense import gpu
from diffusers_accel.kernels.grouped import each_query_head

fused_attention = torch.ops.aten._scaled_dot_product_cudnn_attention.default


def refuses(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why this implementation cannot run there, or None."""
    reason = gpu.refuses(device, dtype)
    if reason is not None:
        return reason
    version = torch.backends.cudnn.version() if torch.version.hip is None else None
    if version is None:
        return "this build of PyTorch has no cuDNN"
    if version <= 91500:  # lengths that are not multiples of 128 come out wrong before; PyTorch avoids it there too
        return f"needs cuDNN 9.15.1 or newer, found {version}"
    if head_dim > 128 or head_dim % 8:
        return f"takes head dims up to 128 in multiples of 8, found {head_dim}"
    return gpu.fails(dense, device, dtype, head_dim)


def dense(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Dense attention; the arguments have been checked by the caller."""
    k, v = (each_query_head(x, q.shape[2]) for x in (k, v))
    twice = k.shape[1] == 1  # cuDNN takes no single key: read twice, it weighs twice, and the output is the same
    if twice:
        k, v = (x.expand(-1, 2, -1, -1) for x in (k, v))
    # Other layouts than this one have given wrong results.
    q, k, v = (x.contiguous().transpose(1, 2) for x in (q, k, v))
    out, lse, *_ = fused_attention(q, k, v, None, True, scale=scale)
    lse = lse.reshape(q.shape[:3])  # [B, H, S, 1]
    return out.transpose(1, 2).contiguous(), (lse - math.log(2) if twice else lse).contiguous()
