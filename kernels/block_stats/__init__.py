"""What softmax attention looks like block by block, without ever holding its map."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from diffusers_accel.kernels.choice import Operator
from diffusers_accel.kernels.grouped import check_key_heads

__all__ = ["BlockStats", "block_stats"]

_operator = Operator(__name__, ("portable", "reference"))


class BlockStats(NamedTuple):
    """Figures of P = exp(scale * q . k - lse), the share that each key has in each query, per block of the map.

    total: fp32 `[B, H, Q, K]`, the sum over the block, 0..block_q: the share of its queries' attention that it holds.
    largest: fp32 `[B, H, Q, K]`, the largest entry, 0..1.
    small: int32 `[B, H, Q, K]`, how many entries lie below epsilon, 0..block_q * block_k.
    """

    total: Tensor
    largest: Tensor
    small: Tensor


def block_stats(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    *,
    block_q: int = 64,
    block_k: int = 64,
    epsilon: float = 1e-3,
    scale: float | None = None,
    impl: str = "auto",
) -> BlockStats:
    """Sum, maximum and number of small entries of each block of the attention map, streamed block by block.

    From these come the scores by which PAROAttention (Zhao et al. 2025, arXiv 2506.16054) chooses a token order and a
    block mask; the tokens are given in the order in question. Only entries that exist count, so a block at a ragged
    edge has fewer.

    Args:
        q: `[B, S_q, H, D]`, fp16, bf16 or fp32, any strides.
        k: `[B, S_k, H_k, D]`, dtype and device of q; H_k divides H, and query head h reads key head h // (H // H_k).
        lse: fp32 `[B, H, S_q]`, natural log, as `attention` returns it for these q and the keys that P is to be a share
            of. A query with lse -inf attends to nothing: its entries are 0.
        block_q: queries per block.
        block_k: keys per block.
        epsilon: positive; entries below it are small.
        scale: positive factor of the scores; None means 1 / sqrt(D).
        impl: `auto`, `portable` or `reference`; an explicit one is obeyed or refused.

    Returns:
        The three figures for every block of every batch row and head, on the device of q.

    Raises:
        ValueError: shapes, dtypes, devices or numbers do not fit, or the implementation asked for cannot run.
    """
    if q.dim() != 4 or 0 in q.shape:
        raise ValueError(f"q must be [B, S, H, D] without an empty dimension, found {list(q.shape)}")
    batch, queries, heads, dim = q.shape
    check_key_heads("k", k, heads)
    if k.dim() != 4 or 0 in k.shape or k.shape[0] != batch or k.shape[3] != dim:
        raise ValueError(f"k must be [{batch}, S_k, H_k, {dim}] to fit q, found {list(k.shape)}")
    if k.dtype != q.dtype or k.device != q.device:
        raise ValueError(f"k must be {q.dtype} on {q.device} as q is, found {k.dtype} on {k.device}")
    if lse.shape != (batch, heads, queries) or lse.dtype != torch.float32 or lse.device != q.device:
        raise ValueError(
            f"lse must be torch.float32 {[batch, heads, queries]} on {q.device}, "
            f"found {lse.dtype} {list(lse.shape)} on {lse.device}"
        )
    if min(block_q, block_k) < 1:
        raise ValueError(f"blocks must hold at least one token, found {block_q} queries x {block_k} keys")
    scale = dim**-0.5 if scale is None else float(scale)
    for name, number in (("epsilon", epsilon), ("scale", scale)):
        if not (number > 0 and math.isfinite(number)):
            raise ValueError(f"{name} must be positive and finite, found {number}")
    module = _operator.choose(impl, q.device, q.dtype, dim, (block_q, block_k))
    with torch.no_grad():
        return BlockStats(*module.block_stats(q, k, lse, block_q, block_k, float(epsilon), scale))
