"""The floor: dense attention a second time, in another exact kernel, on the same clips. What that changes no method can be blamed
for, and a quality number without it misleads.

On a GPU, in half precision, that is torch's memory-efficient kernel; elsewhere torch's attention one dtype up, which costs about
2.5 times the attention of a CPU. Only self-attention is computed so, that which `patch` may change.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from diffusers_accel.api import Attachment, attach
from diffusers_accel.call import AttentionCall

HALF = (torch.bfloat16, torch.float16)


def another_kernel(pipe: object) -> Attachment:
    """Attached to the pipeline, until it is left as a context manager."""
    return attach(pipe, lambda site: _Another())


def describe(device: torch.device, dtype: torch.dtype) -> str:
    """In which kernel the floor's attention runs."""
    if device.type == "cuda" and dtype in HALF:
        return "torch's memory-efficient attention"
    return f"torch's attention in {str(_up(dtype)).removeprefix('torch.')}"


def attend_otherwise(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Exact attention, q [B, queries, H, D], k and v [B, keys, H_k, D] where H_k divides H -> out like q."""
    on_gpu = q.device.type == "cuda" and q.dtype in HALF
    within = q.dtype if on_gpu else _up(q.dtype)
    shared = q.shape[2] // k.shape[2]
    k, v = (each.repeat_interleave(shared, dim=2) if shared > 1 else each for each in (k, v))
    q_, k_, v_ = (each.to(within).transpose(1, 2) for each in (q, k, v))
    with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION) if on_gpu else nullcontext():
        return scaled_dot_product_attention(q_, k_, v_).transpose(1, 2).to(q.dtype)


class _Another:
    """An engine of a site."""

    def attend(self, call: AttentionCall, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend_otherwise(q, k, v)


def _up(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in HALF else torch.float64
