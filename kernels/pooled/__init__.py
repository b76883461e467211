"""Attention to the key blocks that a pattern does not read, each as one key: its mean, which counts for all its tokens.

With `merge` it completes sparse attention: no block of the keys is without weight. These are the proxies of Sol-Attn
(arXiv 2607.24027), of the pattern's block size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffusers_accel.kernels.checks import check_pattern, score_scale
from diffusers_accel.kernels.choice import Choice, Operator
from diffusers_accel.kernels.grouped import check_key_heads
from diffusers_accel.kernels.pattern import BlockPattern

__all__ = ["IMPLEMENTATIONS", "choices", "pooled"]

IMPLEMENTATIONS = ("portable", "reference")

_operator = Operator(__name__, IMPLEMENTATIONS)


def choices(device: torch.device | str, dtype: torch.dtype, head_dim: int, block_q: int = 128) -> list[Choice]:
    """Every implementation with its verdict for such q and query blocks, as `auto` tries them."""
    return _operator.choices(torch.device(device), dtype, head_dim, block_q)


def pooled(
    q: Tensor,
    k_means: Tensor,
    v_means: Tensor,
    pattern: BlockPattern,
    *,
    scale: float | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Softmax attention over the means of the key blocks that `pattern` does not list. Inference only.

    Of n tokens that exist in a block, the mean has the score scale * q . k_mean + log(n), and the value v_mean: exactly
    what the tokens would add to the softmax if their keys were all alike. Merged with `attention` over the blocks that the
    pattern lists, this is one softmax over all keys:

        merge([attention(q, k, v, pattern), pooled(q, pool(k), pool(v), pattern)])

    Args:
        q: `[B, S, H, D]`, fp16, bf16 or fp32, any strides.
        k_means, v_means: `[B, K, H_k, D]`, fp32 or the dtype of q, the means over the tokens of each key block that
            exist, as `pool` makes them of k and v with the `block_k` and `valid` of the pattern. H_k divides H: query
            head h reads key head h // (H // H_k).
        pattern: which key blocks each query block reads in full, on the device of q. The means of these blocks, and of
            blocks of which no token exists, weigh nothing; where no query of a head weighs one, it may hold NaN.
        scale: positive factor of the scores; None means 1 / sqrt(D).
        impl: `auto`, `portable` or `reference`; an explicit one is obeyed or refused.

    Returns:
        out `[B, S, H, D]` in the dtype of q, and the log-sum-exp of the scores, fp32, natural log, `[B, H, S]`, both
        contiguous. A query that reads every block in full has out 0 and lse -inf.

    Raises:
        ValueError: shapes, dtypes, devices, scale or pattern do not fit, or the implementation asked for cannot run;
            with `DIFFUSERS_ACCEL_CHECKS=1` in the environment also when a value of the pattern is out of range.
    """
    if q.dim() != 4 or 0 in q.shape:
        raise ValueError(f"q must be [B, S, H, D] without an empty dimension, found {list(q.shape)}")
    _check_means(q, k_means, v_means, pattern)
    check_pattern(pattern, q, pattern.keys)
    dim = q.shape[3]
    module = _operator.choose(impl, q.device, q.dtype, dim, pattern.block_q)
    with torch.no_grad():
        return module.pooled(q, k_means, v_means, pattern, score_scale(scale, dim))


def _check_means(q: Tensor, k_means: Tensor, v_means: Tensor, pattern: BlockPattern) -> None:
    batch, _, heads, dim = q.shape
    check_key_heads("k_means", k_means, heads)
    expected = [batch, pattern.key_blocks, k_means.shape[2] if k_means.dim() == 4 else heads, dim]
    for name, means in (("k_means", k_means), ("v_means", v_means)):
        if list(means.shape) != expected or 0 in means.shape:
            raise ValueError(
                f"{name} must be {expected} ({pattern.keys} keys in blocks of {pattern.block_k}), "
                f"found {list(means.shape)}"
            )
        if means.dtype not in (torch.float32, q.dtype) or means.device != q.device:
            raise ValueError(
                f"{name} must be torch.float32 or {q.dtype} on {q.device}, found {means.dtype} on {means.device}"
            )
