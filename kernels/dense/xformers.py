"""Dense attention by the xformers package, whose partial attention returns a log-sum-exp to merge by."""

from __future__ import annotations

import importlib
import importlib.util

import torch
from torch import Tensor

from diffusers_accel.extras import install
from diffusers_accel.kernels.dense import gpu
from diffusers_accel.kernels.grouped import each_query_head


def refuses(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why this implementation cannot run there, or None."""
    reason = gpu.refuses(device, dtype)
    if reason is not None:
        return reason
    if importlib.util.find_spec("xformers") is None:
        return f"needs xformers: {install('xformers')}"
    return gpu.fails(dense, device, dtype, head_dim)


def dense(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Dense attention; the arguments have been checked by the caller."""
    k, v = (each_query_head(x, q.shape[2]) for x in (k, v))
    fmha = importlib.import_module("xformers.ops.fmha")
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    out, lse = fmha.memory_efficient_attention_partial(q, k, v, scale=scale)
    # Some of its kernels answer in fp32, some pad the queries of the log-sum-exp.
    return out.to(q.dtype).contiguous(), lse[..., : q.shape[1]].contiguous()
