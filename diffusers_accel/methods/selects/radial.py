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
from diffusers_accel.methods.blocks import BLOCK, always_read
from diffusers_accel.methods.order import Order
from diffusers_accel.methods.select import StaticSelect
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

    def mask(self, call: AttentionCall, order: Order, tensors: Tensors) -> Tensor:
        always, text = always_read(call.layout, self.first_frame)
        rows = [_key_blocks(reads, queries) for reads, queries in _reads(call.layout, self.decay)]
        mask = torch.stack(rows) | always | torch.eye(len(always), dtype=torch.bool)
        mask[text] = True
        return mask[None]


def _reads(layout: TokenLayout, decay: float) -> Iterator[tuple[Tensor, int]]:
    """For each query block, by how many of its video tokens each key is read, int32 [blocks * BLOCK], and how many it has."""
    size, start = layout.height * layout.width, layout.video_start
    width = torch.tensor([_width(distance, size, decay) for distance in range(layout.frames)], dtype=torch.int32)
    token = torch.arange(layout.video_tokens, dtype=torch.int32)
    frame, place = token // size, token % size
    for block in range(layout.blocks(BLOCK)):
        first, stop = (min(max(edge * BLOCK - start, 0), layout.video_tokens) for edge in (block, block + 1))
        reads = torch.zeros(layout.blocks(BLOCK) * BLOCK, dtype=torch.int32)
        video = reads[start : start + layout.video_tokens]
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
