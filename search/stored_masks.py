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
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from diffusers_accel.files import quoted
from diffusers_accel.kernels.block_stats import block_stats
from diffusers_accel.kernels.pattern import block_lengths
from diffusers_accel.layout import TokenLayout
from diffusers_accel.methods.arrangement import arrangement
from diffusers_accel.methods.blocks import BLOCK
from diffusers_accel.methods.orders import AxisOrder, parse_order
from diffusers_accel.search.scores_file import Array

TILE = 64  # tokens of a tile's side, as in the paper
ORDER_TILES = 4  # orders are judged by every fourth row of tiles
QUERY_STEP = 4  # and blocks by every fourth query, whose neighbours look alike


@dataclass(frozen=True)
class MaskSettings:
    """How orders and masks are chosen, in the paper's letters.

    Args:
        alpha: weight of empty tiles against even ones in the choice of an order, in [0, 1]. The paper does not report its own.
        epsilon: attention weights below it are small, in (0, 1).
        sigma: share of small weights from which on a tile counts as empty, in (0, 1].
        segments: equal segments of the schedule that have masks of their own, 1 or more. The paper's code has between 4
            and 30.
    """

    alpha: float = 0.5
    epsilon: float = 1e-3
    sigma: float = 0.9
    segments: int = 3

    def __post_init__(self) -> None:
        if not (0 <= self.alpha <= 1 and 0 < self.epsilon < 1 and 0 < self.sigma <= 1):
            raise ValueError(
                f"masks: expected alpha in [0, 1], epsilon in (0, 1) and sigma in (0, 1], found {self.alpha}, "
                f"{self.epsilon} and {self.sigma}"
            )
        if not isinstance(self.segments, int) or isinstance(self.segments, bool) or self.segments < 1:
            raise ValueError(
                f"masks: expected segments to be a whole number of 1 or more, found {quoted(self.segments)}"
            )


USUAL_MASKS = MaskSettings()


def order_scores(
    q: Tensor, k: Tensor, lse: Tensor, layout: TokenLayout, axes: Sequence[str], masks: MaskSettings = USUAL_MASKS
) -> tuple[Array, Array]:
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
            block_q=TILE, block_k=TILE, epsilon=masks.epsilon,
        )  # fmt: skip
        mean = stats.total / entries
        ratio = torch.where(mean > 0, stats.largest / mean, 1.0)
        sparse.append((stats.small >= masks.sigma * entries).double().mean((2, 3))[0])
        quant.append(ratio.double().mean((2, 3))[0])
    return torch.stack(sparse, 1).cpu().numpy(), torch.stack(quant, 1).cpu().numpy()


def best_orders(sparse: Array, quant: Array, masks: MaskSettings = USUAL_MASKS) -> Array:
    """int [..., heads]: which order each head takes, from `order_scores` [..., heads, orders]; -1 where there are none."""

    def share(scores: Array) -> Array:
        total = scores.sum(-1, keepdims=True)
        return np.divide(scores, total, out=np.zeros_like(scores), where=total > 0)

    best = (masks.alpha * (1 - share(sparse)) + (1 - masks.alpha) * share(quant)).argmin(-1)
    return np.where(quant.any(-1), best, -1)


def block_shares(q: Tensor, k: Tensor, lse: Tensor) -> Tensor:
    """fp32 [H, query blocks, key blocks]: the share of its queries' attention that a block of `BLOCK` x `BLOCK` holds.

    Args:
        q: [1, rows, H, D], every `QUERY_STEP`-th query, from the first, in the order in question.
        k: [1, keys, H, D], in that order.
        lse: fp32 [1, H, rows], of these queries.
    """
    block = BLOCK // QUERY_STEP
    total = block_stats(q, k, lse, block_q=block, block_k=BLOCK, epsilon=USUAL_MASKS.epsilon).total[0]
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
