"""The select stage: which key blocks does a query block read?

Sparse-vDiT (arXiv 2506.03065) gives each head one of five fixed patterns. All of them are static: they depend on the
layout and, for a calibrated stripe, on the head, never on q and k. Masks are over blocks of `BLOCK` tokens in the
method's own token order. `stored` and `draft` hold the two other ways to select.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from diffusers_accel.files import quoted
from diffusers_accel.layout import TokenLayout
from diffusers_accel.methods.context import Context
from diffusers_accel.methods.orders import Order

BLOCK = 128  # tokens of a query block and of a key block


@dataclass(frozen=True)
class All:
    """Every query reads every key: dense attention (Sparse-vDiT's M0)."""

    kind: ClassVar[str] = "all"
    label: ClassVar[str] = ""

    def mask(self, ctx: Context, order: Order) -> Tensor:
        blocks = ctx.layout.blocks(BLOCK)
        return torch.ones(1, blocks, blocks, dtype=torch.bool)


@dataclass(frozen=True)
class Skip:
    """No query reads anything: the head's output is 0 (Sparse-vDiT's M1)."""

    kind: ClassVar[str] = "skip"
    label: ClassVar[str] = ""

    def mask(self, ctx: Context, order: Order) -> Tensor:
        blocks = ctx.layout.blocks(BLOCK)
        return torch.zeros(1, blocks, blocks, dtype=torch.bool)


@dataclass(frozen=True)
class Band:
    """Each query block reads the key blocks nearest to it (M2; in the order "hwf" it is M3, multi-diagonal).

    Unlike the paper's sliding window, whose rows shrink at the ends of the sequence, rows here keep their length: the
    window is shifted inside. So the density is exactly what was asked for, up to one block a row, and rows are balanced.

    Args:
        density: share of key blocks that a video query block reads, in (0, 1], the always-read blocks (text, first frame)
            included. At least the block itself and the always-read blocks are read, so small densities are exceeded.
        first_frame: always read the first frame's keys, where the order keeps it together.
    """

    density: float
    first_frame: bool = True
    kind: ClassVar[str] = "band"

    def __post_init__(self) -> None:
        check_density(self.density)

    @property
    def label(self) -> str:
        return f"{self.density:g}"

    def mask(self, ctx: Context, order: Order) -> Tensor:
        blocks = ctx.layout.blocks(BLOCK)
        always, text = always_read(ctx.layout, self.first_frame and order.frame_major)
        index = torch.arange(blocks)
        distance = (index[:, None] - index[None, :]).abs().double()
        distance += (index[None, :] > index[:, None]) * 0.5  # ties go to the earlier block
        keep = always[None, :] | torch.eye(blocks, dtype=torch.bool)
        rank = distance.masked_fill(keep, -1).argsort(dim=1, stable=True).argsort(dim=1)
        mask = keep | (rank < max(1, round(self.density * blocks)))
        mask[text] = True
        return mask[None]


@dataclass(frozen=True)
class Stripe:
    """All queries read the same key columns (M4, vertical stripe), and each block itself.

    Args:
        density: share of key blocks that a video query block reads, in (0, 1], always-read blocks included.
        first_frame: always read the first frame's keys.
        calibrated: take the columns that got most attention during the search, from the plan's tensor
            "stripe_mass/<transformer>", [layers, heads, frames, height]: the mean probability that a key in that latent
            frame and token row receives, resized where the layout differs. Otherwise columns are spread evenly.
    """

    density: float
    first_frame: bool = True
    calibrated: bool = False
    kind: ClassVar[str] = "stripe"

    def __post_init__(self) -> None:
        check_density(self.density)

    @property
    def label(self) -> str:
        return f"{self.density:g}"

    def mask(self, ctx: Context, order: Order) -> Tensor:
        blocks = ctx.layout.blocks(BLOCK)
        always, text = always_read(ctx.layout, self.first_frame)
        score = self._column_score(ctx) if self.calibrated else _spread(blocks)[None]
        ranked = score.masked_fill(always, math.inf).argsort(dim=1, descending=True, stable=True)
        rank = ranked.argsort(dim=1)
        wanted = max(1, round(self.density * blocks))
        # A row whose own block is not among the best columns reads it instead of the last of them.
        best, all_but_one = (rank < wanted) | always, (rank < wanted - 1) | always
        mask = torch.where(best[:, :, None], best[:, None], all_but_one[:, None]) | torch.eye(blocks, dtype=torch.bool)
        mask[:, text] = True
        return mask

    def _column_score(self, ctx: Context) -> Tensor:
        """[heads, key blocks], fp64: the attention mass that each key block received in the search."""
        name = f"stripe_mass/{ctx.transformer}"
        if name not in ctx.tensors:
            raise ValueError(
                f"a calibrated stripe needs the tensor {name!r} of a searched plan, found {sorted(ctx.tensors)}"
            )
        layout = ctx.layout
        mass = ctx.tensors[name][ctx.layer, list(ctx.heads)].double()
        if mass.shape[1:] != (layout.frames, layout.height):
            size = (layout.frames, layout.height)
            mass = torch.nn.functional.interpolate(mass[:, None], size=size, mode="bilinear", align_corners=False)[:, 0]
        per_token = mass[..., None].expand(-1, -1, -1, layout.width).flatten(1)
        sequence = torch.zeros(len(ctx.heads), layout.blocks(BLOCK) * BLOCK, dtype=torch.float64)
        sequence[:, layout.video_start : layout.video_start + layout.video_tokens] = per_token
        return sequence.unflatten(1, (-1, BLOCK)).sum(-1)


def check_density(density: float) -> None:
    if isinstance(density, bool) or not (isinstance(density, (int, float)) and 0 < density <= 1):
        raise ValueError(
            f"density is the share of key blocks that are read, expected in (0, 1], found {quoted(density)}"
        )


def _spread(blocks: int) -> Tensor:
    """A score by which any prefix of the ranking is spread evenly: the bit-reversed (van der Corput) index."""
    bits = max(1, math.ceil(math.log2(max(blocks, 2))))
    return torch.tensor([-int(f"{index:0{bits}b}"[::-1], 2) for index in range(blocks)], dtype=torch.float64)


def always_read(layout: TokenLayout, first_frame: bool) -> tuple[Tensor, Tensor]:
    """Blocks that every query reads, and those that hold text (which also read everything): bool [blocks] each."""
    text = torch.zeros(layout.blocks(BLOCK), dtype=torch.bool)
    if layout.text_tokens:
        text[layout.text_start // BLOCK : math.ceil((layout.text_start + layout.text_tokens) / BLOCK)] = True
    always = text.clone()
    if first_frame:
        first_stop = layout.video_start + layout.height * layout.width
        always[layout.video_start // BLOCK : math.ceil(first_stop / BLOCK)] = True
    return always, text
