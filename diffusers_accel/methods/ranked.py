"""Selections that rank block pairs by a score and read the best of them: what they share is the budget."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from diffusers_accel.call import AttentionCall
from diffusers_accel.files import quoted
from diffusers_accel.kernels.kept import kept
from diffusers_accel.kernels.pattern import BlockPattern
from diffusers_accel.layout import TokenLayout
from diffusers_accel.methods.arrangement import Blocks, arrangement
from diffusers_accel.methods.blocks import BLOCK, FOREVER, check_density
from diffusers_accel.methods.order import Order
from diffusers_accel.methods.select import Select


@dataclass(frozen=True)
class RankedSelect(Select):
    """How many of the best block pairs are read, which are read whatever they score, and for how long.

    A member scores the pairs, in a softmax over the key blocks of a row, and calls `best`.

    Args:
        density: share of the block pairs of the video that is read, in (0, 1]; text is always read beside it. None with
            `top_p`.
        top_p: read in each row the fewest blocks whose share of the map reaches this, in (0, 1], instead of a density.
        per: over what the best pairs are counted: "head": its whole map, so that a row that scores high gets more; "row": equally
            many in each row.
        min_blocks: blocks that a row reads at least; all where there are fewer.
        diagonal: always read a block's own keys.
        first_frame: always read the first frame's keys, where the order keeps it together.
        reselect_every: steps for which a selection is kept, 1 or more.
    """

    density: float | None = 0.25
    top_p: float | None = None
    per: str = "head"
    min_blocks: int = 1
    diagonal: bool = True
    first_frame: bool = True
    reselect_every: int = 1

    def __post_init__(self) -> None:
        if (self.density is None) == (self.top_p is None):
            raise ValueError(
                f"a {self.kind} takes either a density or a top_p, found density {self.density} and top_p {self.top_p}; "
                "give density=None (null in a file) with a top_p"
            )
        if self.density is not None:
            check_density(self.density)
        elif not (isinstance(self.top_p, (int, float)) and 0 < self.top_p <= 1):
            raise ValueError(f"top_p is a share of each row's attention, expected in (0, 1], found {self.top_p}")
        if self.per not in ("head", "row"):
            raise ValueError(f'per is "head" or "row", found {quoted(self.per)}')
        if self.top_p is not None and self.per != "head":
            raise ValueError(f"a top_p decides row by row: leave per out, found {self.per!r}")
        if self.min_blocks < 0 or self.reselect_every < 1:
            raise ValueError(
                f"expected min_blocks >= 0 and reselect_every >= 1, found {self.min_blocks} and {self.reselect_every}"
            )

    @property
    def label(self) -> str:
        amount = f"{self.density:g}" if self.density is not None else f"top-p {self.top_p:g}"
        words = (
            "row" if self.per == "row" else "",
            amount,
            f"reselect {self.reselect_every}" if self.reselect_every > 1 else "",
        )
        return " ".join(word for word in words if word)

    def expected_density(self, order: Order, layout: TokenLayout | None = None) -> float | None:
        return self.density

    @property
    def representative(self) -> Select:
        return replace(self, reselect_every=FOREVER) if self.reselect_every > 1 else self

    def starved(self, pattern: BlockPattern, order: Order, layout: TokenLayout) -> Tensor | None:
        places = arrangement(order, layout)
        (first, stop), (start, end) = places.video_queries, places.video_keys
        if self.min_blocks or first == stop or start == end:
            return None
        blocks, counts = pattern.blocks[:, :, first:stop], pattern.counts[:, :, first:stop]
        listed = torch.arange(blocks.shape[3], device=blocks.device) < counts[..., None]
        return 1 - (listed & (blocks >= start) & (blocks < end)).any(-1).double().mean()

    def best(
        self, select: Callable[..., BlockPattern], call: AttentionCall, order: Order, device: torch.device
    ) -> BlockPattern:
        """The best pairs of a call.

        Args:
            select: `kernels.select.select` with its means, or `select_by_scores` with its scores.
            device: of these.
        """
        layout = call.layout
        always, rows, columns = _forced(layout, order, self.diagonal, self.first_frame, device)
        if rows == (0, 0) or columns == (0, 0):  # every block holds exact tokens, which all read
            return BlockPattern.full(len(call.heads), layout.queries, layout.keys, BLOCK, BLOCK, device=device)
        return select(
            queries=layout.queries,
            keys=layout.keys,
            density=self.density,
            top_p=self.top_p,
            per=self.per,
            always=always,
            competing=columns,
            competing_queries=rows,
            min_blocks=min(self.min_blocks, columns[1] - columns[0]),
            block_q=BLOCK,
            block_k=BLOCK,
        )


@kept(64)
def _forced(
    layout: TokenLayout, order: Order, diagonal: bool, first_frame: bool, device: torch.device
) -> tuple[Tensor, Blocks, Blocks]:
    """bool [query blocks, key blocks]: what is read whatever the map says; and the query and the key blocks that compete."""
    places = arrangement(order, layout)
    always = places.always(first_frame)
    forced = places.own | always if diagonal else always.expand(places.own.shape)
    return forced[:, : layout.key_blocks(BLOCK)].to(device), places.video_queries, places.video_keys
