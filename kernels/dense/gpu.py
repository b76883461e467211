"""What the implementations of others on GPUs have in common: what they take, and the trial that they have to pass.

How they lay out, pad and scale a log-sum-exp is not part of their documented interface and has changed between versions.
So each is asked once per device, dtype and head dim for an attention whose answer is known; one that errs is refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from diffusers_accel.kernels import hardware

Dense = Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]

# Neither fills a tile, so that padding which is weighed or returned shows.
QUERIES, KEYS, HEADS = 40, 72, 2


def refuses(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why no such implementation can run there, or None."""
    if device.type != "cuda":
        return f"runs on CUDA and ROCm devices, found {device.type}"
    if not torch.cuda.is_available():
        return "runs on CUDA and ROCm devices, torch sees none"
    if hardware.capability(device) < 80:
        return f"needs compute capability 8.0 or newer, found {hardware.capability(device) / 10}"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"takes float16 and bfloat16, found {dtype}"
    return None


def fails(dense: Dense, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why an implementation is not right on a few tokens there, or None. Waits for the device.

    All scores are 1, so the log-sum-exp is 1 + ln(keys); the values of a head are all its number.
    """
    q, k = (torch.ones(1, tokens, HEADS, head_dim, dtype=dtype, device=device) for tokens in (QUERIES, KEYS))
    v = k * torch.arange(HEADS, dtype=dtype, device=device)[:, None]
    try:
        out, lse = dense(q, k, v, 1 / head_dim)
        if out.shape != q.shape or lse.shape != (1, HEADS, QUERIES) or lse.dtype != torch.float32:
            return f"returned {list(out.shape)} and {list(lse.shape)} in {lse.dtype} for {QUERIES} queries"
        errors = ((lse - 1 - math.log(KEYS)).abs().max().item(), (out - v[:, :1]).abs().max().item())
    except torch.OutOfMemoryError:
        raise  # passes, while a refusal is for good
    except Exception as error:  # whatever a build that does not fit raises is the reason
        return f"failed on {QUERIES} queries and {KEYS} keys: {' '.join(str(error).split()) or type(error).__name__}"
    if not all(error < 0.01 for error in errors):  # NaN compares as False
        return (
            f"erred by {errors[0]:.3g} in the log-sum-exp and {errors[1]:.3g} in the output of a trial, expected < 0.01"
        )
    return None
