"""Radial Attention's selection (arXiv 2506.19852): the farther apart two frames are, the less of each other they read."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from diffusers_accel.call import AttentionCall
from diffusers_accel.files import quoted
from diffusers_accel.layout import TokenLayout
from diffusers_accel.methods.arrangement import arrangement
from diffusers_accel.methods.blocks import BLOCK
from diffusers_accel.methods.order import Order, exact_tokens
from diffusers_accel.methods.select import StaticSelect, mask_of_layout
from diffusers_accel.methods.uses import Tensors


@dataclass(frozen=True)
class Radial(StaticSelect):
    """A window around the same place of another frame, which halves whenever the distance of the frames doubles.

    With s tokens a frame, a token at place m of its frame reads those at the places p of a frame at distance d where

        d <= 1: all        d > 1: |p - m| <= max(128, decay * w), w = 2**bits(s) / 2**bits(d), bits(n) = floor(log2 n) + 1

    and once w is below 128, the size of a block, only frames whose distance is a multiple of floor(128 / w). So the pairs that
    are read grow as N log N with the number of tokens. A pair of blocks is read if, of the keys in it that some query of the
    block reads, more than 60 % are read by more than a third of its queries. A block's own keys are always read.

    Args:
        decay: factor of the window, above 0. The formula of the paper has 1; its code takes 0.2 for Wan 2.1, 0.8 for Wan 2.2
            and 0.95 for HunyuanVideo.
        first_frame: always read the first frame's keys (the attention sink).
    """

    decay: float = 1.0
    first_frame: bool = True
    kind: ClassVar[str] = "radial"

    def __post_init__(self) -> None:
        number = isinstance(self.decay, (int, float)) and not isinstance(self.decay, bool)
        if not (number and 0 < self.decay < math.inf):
            raise ValueError(
                f"decay is a factor of the window's width, expected a number above 0, found {quoted(self.decay)}"
            )

    @property
    def label(self) -> str:
        return f"{self.decay:g}"

    def refuses(self, order: Order) -> str | None:
        if order.frame_major:
            return None
        return (
            f'"{self.kind}" has a window for each pair of frames: it goes with orders that keep frames together, '
            f"found {order.label}"
        )

    def expected_density(self, order: Order, layout: TokenLayout | None = None) -> float | None:
        if layout is None:
            return None
        places = arrangement(order, layout)
        video = mask_of_layout(self, order, layout)[0, slice(*places.video_queries), slice(*places.video_keys)]
        return float(video.double().mean()) if video.numel() else 1.0

    def mask(self, call: AttentionCall, order: Order, tensors: Tensors) -> Tensor:
        places = arrangement(order, call.layout)
        rows = [_key_blocks(reads, queries) for reads, queries in _reads(call.layout, order, self.decay)]
        mask = torch.stack(rows) | places.always(self.first_frame) | places.own
        mask[places.exact_queries] = True
        return mask[None]


def _reads(layout: TokenLayout, order: Order, decay: float) -> Iterator[tuple[Tensor, int]]:
    """For each query block, by how many of its video tokens each key is read, int32 [blocks * BLOCK], and how many it has."""
    size, tokens = layout.height * layout.width, layout.video_tokens
    start = int(
        (~exact_tokens(layout)[order.index(layout)]).nonzero()[0]
    )  # of the video, which an order keeps together
    width = torch.tensor([_width(distance, size, decay) for distance in range(layout.frames)], dtype=torch.int32)
    token = torch.arange(tokens, dtype=torch.int32)
    frame, place = token // size, token % size
    for block, at in enumerate((arrangement(order, layout).start * BLOCK).round().int().tolist()):
        asking = min(BLOCK, layout.queries - block * BLOCK)
        first, stop = (min(max(edge - start, 0), tokens) for edge in (at, at + asking))
        reads = torch.zeros(layout.blocks(BLOCK) * BLOCK, dtype=torch.int32)
        video = reads[start : start + tokens]
        for number in range(first // size, -(-stop // size)):  # the part of the block that is of this frame
            lowest, highest = max(first - number * size, 0), min(stop - number * size, size) - 1
            window = width[(frame - number).abs()]
            video += ((place + window).clamp(max=highest) - (place - window).clamp(min=lowest) + 1).clamp(min=0)
        yield reads, stop - first


def _width(distance: int, size: int, decay: float) -> int:
    """Half the width of the window between frames of `size` tokens at a distance; -1 where nothing is read."""
    if distance <= 1:
        return size
    wide = 2.0 ** (size.bit_length() - distance.bit_length())
    if wide < BLOCK and distance % int(BLOCK / wide):
        return -1
    return int(min(max(BLOCK, decay * wide), size))


def _key_blocks(reads: Tensor, queries: int) -> Tensor:
    """bool [blocks]: where more than 60 % of the keys that are read at all are read by more than a third of the queries."""
    by_block = reads.unflatten(0, (-1, BLOCK))
    return 5 * (3 * by_block > queries).sum(1) > 3 * (by_block > 0).sum(1)
