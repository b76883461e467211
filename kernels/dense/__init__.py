"""Dense attention with its log-sum-exp, from whoever computes it fastest on the device: PyTorch, xformers or this project."""

from __future__ import annotations

import torch
from torch import Tensor

from diffusers_accel.kernels import ranking
from diffusers_accel.kernels.checks import check_qkv, score_scale
from diffusers_accel.kernels.choice import Choice, Operator

__all__ = ["IMPLEMENTATIONS", "Choice", "choices", "dense"]

IMPLEMENTATIONS = tuple(ranking.IMPLEMENTATIONS["dense"])


def _order(device: torch.device, dtype: torch.dtype, head_dim: int) -> tuple[str, ...]:
    return ranking.order("dense", device, "input", head_dim)


_operator = Operator(__name__, IMPLEMENTATIONS, _order, ranking.IMPLEMENTATIONS["dense"])


def choices(device: torch.device | str, dtype: torch.dtype, head_dim: int) -> list[Choice]:
    """Every implementation with its verdict for such q, k, v, in the order of `kernels/ranking.py`: the first that is
    `automatic` is the one that `auto` takes. On a GPU the first call tries those of others on a few tokens, and waits."""
    return _operator.choices(torch.device(device), dtype, head_dim)


def dense(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, impl: str = "auto") -> tuple[Tensor, Tensor]:
    """Softmax attention of every query over every key. Inference only: the outputs carry no gradient.

    Means the same as `kernels.attention.attention` without a pattern, and returns the same up to rounding.

    Args:
        q: `[B, S_q, H, D]`, fp16, bf16 or fp32, any strides.
        k, v: `[B, S_k, H_k, D]`, dtype and device of q; H_k divides H, and query head h reads key head
            h // (H // H_k).
        scale: positive factor of the scores; None means 1 / sqrt(D).
        impl: `auto` takes the fastest that can run, the same at every call for a device, dtype and head dim; a name of
            `IMPLEMENTATIONS` is obeyed or refused.

    Returns:
        out `[B, S_q, H, D]` in the dtype of q, and the log-sum-exp of the scaled scores, fp32, natural log,
        `[B, H, S_q]`, both contiguous.

    Raises:
        ValueError: shapes, dtypes, devices or scale do not fit, or the implementation asked for cannot run.
    """
    check_qkv(q, k, v)
    module = _operator.choose(impl, q.device, q.dtype, q.shape[3])
    with torch.no_grad():
        return module.dense(q, k, v, score_scale(scale, q.shape[3]))
