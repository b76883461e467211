"""Dense attention by FlashAttention-2 (Dao 2023, arXiv 2307.08691) as PyTorch ships it, AOTriton's on ROCm."""

from __future__ import annotations

import torch
from torch import Tensor

from diffusers_accel.kernels.dense import gpu
from diffusers_accel.kernels.grouped import each_query_head

fused_attention = torch.ops.aten._scaled_dot_product_flash_attention.default


def refuses(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why this implementation cannot run there, or None."""
    reason = gpu.refuses(device, dtype)
    if reason is not None:
        return reason
    if not torch.backends.cuda.is_flash_attention_available():
        return "this build of PyTorch has no flash attention"
    if head_dim > 256 or head_dim % 8:
        return f"takes head dims up to 256 in multiples of 8, found {head_dim}"
    return gpu.fails(dense, device, dtype, head_dim)


def dense(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Dense attention; the arguments have been checked by the caller."""
    k, v = (each_query_head(x, q.shape[2]) for x in (k, v))
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    out, lse, *_ = fused_attention(*(x.transpose(1, 2) for x in (q, k, v)), scale=scale)
    return out.transpose(1, 2).contiguous(), lse.contiguous()
