"""PAROAttention's calibration (arXiv 2506.16054): per head an axis order, and in it the blocks that got most attention.

Both are read off the attention map of full q and k, which `kernels.block_stats` streams block by block. The order of a head
has the least alpha (1 - S) + (1 - alpha) Q, where S is the share of tiles that are nearly empty, and Q the mean ratio of a
tile's largest to its mean entry, each divided by its sum over the orders. The paper prints S without the "1 -", which would
prefer orders without empty tiles; its alpha is not reported, ours is 1/2. The mask keeps a share of a head's blocks: those
with the largest share of their queries' attention, and in each row at least the best one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from diffusers_accel.kernels.block_stats import block_stats
from diffusers_accel.kernels.pattern import block_lengths
from diffusers_accel.layout import TokenLayout
from diffusers_accel.methods.arrangement import arrangement
from diffusers_accel.methods.blocks import BLOCK
from diffusers_accel.methods.orders import AxisOrder, parse_order
from diffusers_accel.search.scores_file import Array

TILE = 64  # tokens of a tile's side, as in the paper
ALPHA = 0.5
SMALL = 1e-3  # entries below it are small
NEARLY_EMPTY = 0.9  # share of small entries from which on a tile is
ORDER_TILES = 4  # orders are judged by every fourth row of tiles
QUERY_STEP = 4  # and blocks by every fourth query, whose neighbours look alike


def order_scores(q: Tensor, k: Tensor, lse: Tensor, layout: TokenLayout, axes: Sequence[str]) -> tuple[Array, Array]:
    """How well each order gathers the attention of each head.

    Args:
        q: [1, S, H, D]; k: [1, keys, H, D], in the model's order.
        lse: fp32 [1, H, S].

    Returns:
        fp64 [H, orders] each: share of nearly empty tiles, 0..1; mean of largest / mean entry of a tile, 1 or more.
    """
    places = torch.arange(q.shape[1], device=q.device)
    places = places[places // TILE % ORDER_TILES == 0]
    entries = block_lengths(len(places), TILE, None, q.device)[:, None] * block_lengths(
        k.shape[1], TILE, None, q.device
    )
    sparse, quant = [], []
    for each in axes:
        sequence = parse_order(each).index(layout).to(q.device)
        rows = sequence[places]
        stats = block_stats(
            q[:, rows], k[:, sequence[: k.shape[1]]], lse[:, :, rows].contiguous(),
            block_q=TILE, block_k=TILE, epsilon=SMALL,
        )  # fmt: skip
        mean = stats.total / entries
        ratio = torch.where(mean > 0, stats.largest / mean, 1.0)
        sparse.append((stats.small >= NEARLY_EMPTY * entries).double().mean((2, 3))[0])
        quant.append(ratio.double().mean((2, 3))[0])
    return torch.stack(sparse, 1).cpu().numpy(), torch.stack(quant, 1).cpu().numpy()


def best_orders(sparse: Array, quant: Array) -> Array:
    """int [..., heads]: which order each head takes, from `order_scores` [..., heads, orders]; -1 where there are none."""

    def share(scores: Array) -> Array:
        total = scores.sum(-1, keepdims=True)
        return np.divide(scores, total, out=np.zeros_like(scores), where=total > 0)

    best = (ALPHA * (1 - share(sparse)) + (1 - ALPHA) * share(quant)).argmin(-1)
    return np.where(quant.any(-1), best, -1)


def block_shares(q: Tensor, k: Tensor, lse: Tensor) -> Tensor:
    """fp32 [H, query blocks, key blocks]: the share of its queries' attention that a block of `BLOCK` x `BLOCK` holds.

    Args:
        q: [1, rows, H, D], every `QUERY_STEP`-th query, from the first, in the order in question.
        k: [1, keys, H, D], in that order.
        lse: fp32 [1, H, rows], of these queries.
    """
    block = BLOCK // QUERY_STEP
    total = block_stats(q, k, lse, block_q=block, block_k=BLOCK, epsilon=SMALL).total[0]
    return total / block_lengths(q.shape[1], block, None, q.device)[:, None]


def kept_levels(shares: Tensor, layout: TokenLayout, densities: Sequence[float]) -> Tensor:
    """uint8 [H, blocks, blocks]: by how many of the ascending `densities` a block is kept: those from the n-th last on.

    A sparser mask is always part of a denser one. Only blocks of video compete; text is read in any case.
    """
    first, stop = arrangement(AxisOrder(), layout).video_keys  # the same in all axis orders
    square = shares[:, first:stop, first:stop]
    height = stop - first
    best = torch.zeros_like(square, dtype=torch.bool).scatter_(2, square.argmax(2, keepdim=True), True)
    ranked = square.masked_fill(best, math.inf).flatten(1).argsort(stable=True, dim=1, descending=True)
    place = torch.empty_like(ranked).scatter_(
        1, ranked, torch.arange(height**2, device=ranked.device).expand_as(ranked)
    )
    wanted = torch.tensor([max(height, round(each * height**2)) for each in densities], device=place.device)
    blocks = layout.blocks(BLOCK)
    levels = torch.zeros(len(shares), blocks, blocks, dtype=torch.uint8, device=shares.device)
    levels[:, first:stop, first:stop] = (
        (place[..., None] < wanted).sum(2).to(torch.uint8).unflatten(1, (height, height))
    )
    return levels
