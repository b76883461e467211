"""Dense attention on a CPU by PyTorch's own fused attention, which returns a log-sum-exp too."""

from __future__ import annotations

import torch
from torch import Tensor

from diffusers_accel.kernels.grouped import each_query_head

fused_attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


def refuses(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why this implementation cannot run there, or None."""
    if device.type != "cpu":
        return f"runs on cpu tensors, found {device.type}"
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"takes float16, bfloat16 and float32, found {dtype}"
    return None


def dense(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Dense attention; the arguments have been checked by the caller."""
    k, v = (each_query_head(x, q.shape[2]) for x in (k, v))
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    out, lse = fused_attention(*(x.transpose(1, 2) for x in (q, k, v)), scale=scale)
    return out.transpose(1, 2).contiguous(), lse.contiguous()
