"""The band: each query block reads the key blocks that lie nearest to it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from diffusers_accel.call import AttentionCall
from diffusers_accel.layout import TokenLayout
from diffusers_accel.methods.arrangement import arrangement, wanted_blocks
from diffusers_accel.methods.blocks import check_density
from diffusers_accel.methods.order import Order
from diffusers_accel.methods.select import StaticSelect
from diffusers_accel.methods.uses import Tensors


@dataclass(frozen=True)
class Band(StaticSelect):
    """Each query block reads the key blocks nearest to it (M2; in the order "hwf" it is M3, multi-diagonal).

    Unlike the paper's sliding window, whose rows shrink at the ends of the sequence, rows here keep their length: the
    window is shifted inside. So every row reads the density that was asked for, up to one block, and rows are balanced. At equal
    density the paper's rows in the middle are wider, as they make up for those at the ends: 2 (1 - sqrt(1 - density)) of the
    blocks, .27 for a quarter and .59 for a half. And a row's own window is narrower by what is always read elsewhere.

    Args:
        density: share of the video's key blocks that a video query block reads, in (0, 1], the first frame's included; text is
            always read beside them. At least the block itself and the always-read ones are read, so small densities are
            exceeded.
        first_frame: always read the first frame's keys, where the order keeps it together.
        text_counts: count text blocks in the density, as plans of version 1 did.
    """

    density: float
    first_frame: bool = True
    text_counts: bool = False
    kind: ClassVar[str] = "band"

    def __post_init__(self) -> None:
        check_density(self.density)

    @property
    def label(self) -> str:
        return f"{self.density:g}"

    def expected_density(self, order: Order, layout: TokenLayout | None = None) -> float:
        return self.density

    def mask(self, call: AttentionCall, order: Order, tensors: Tensors) -> Tensor:
        places = arrangement(order, call.layout)
        ahead = torch.arange(len(places.exact_keys)) - places.start[:, None]
        distance = ahead.abs() + (ahead > 0) * 1e-6  # ties go to the earlier block
        keep = places.always(self.first_frame) | places.own
        rank = distance.masked_fill(keep, -1).argsort(dim=1, stable=True).argsort(dim=1)
        mask = keep | (rank < wanted_blocks(self.density, places, self.text_counts))
        mask[places.exact_queries] = True
        return mask[None]
