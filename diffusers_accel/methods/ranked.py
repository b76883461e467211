"""Selections that rank block pairs by a score and read the best of them: what they share is the budget."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusers_accel.call import AttentionCall
from diffusers_accel.files import quoted
from diffusers_accel.kernels.kept import kept
from diffusers_accel.kernels.pattern import BlockPattern
from diffusers_accel.kernels.select import starved_rows
from diffusers_accel.layout import TokenLayout
from diffusers_accel.methods.blocks import BLOCK, always_read, check_density, video_blocks
from diffusers_accel.methods.order import Order
from diffusers_accel.methods.select import Select


@dataclass(frozen=True)
class RankedSelect(Select):
    """How many of the best block pairs are read, which are read whatever they score, and for how long.

    A member scores the pairs, in a softmax over the key blocks of a row, and calls `best`.

    Args:
        density: share of the block pairs of the video that is read, in (0, 1]; text is always read beside it. None with
            `mass`.
        mass: read in each row the fewest blocks whose share of the map reaches this, in (0, 1], instead of a density.
        rule: "quantile": the best of a head's whole map; "row": equally many in each row.
        floor: blocks that a row reads at least; all where there are fewer.
        diagonal: always read a block's own keys.
        first_frame: always read the first frame's keys, where the order keeps it together.
        hold: steps for which a selection is kept, 1 or more.
    """

    density: float | None = 0.25
    mass: float | None = None
    rule: str = "quantile"
    floor: int = 1
    diagonal: bool = True
    first_frame: bool = True
    hold: int = 1

    def __post_init__(self) -> None:
        if (self.density is None) == (self.mass is None):
            raise ValueError(
                f"a {self.kind} takes either a density or a mass, found density {self.density} and mass {self.mass}; "
                "give density=None with a mass"
            )
        if self.density is not None:
            check_density(self.density)
        elif not (isinstance(self.mass, (int, float)) and 0 < self.mass <= 1):
            raise ValueError(f"mass is a share of each row's attention, expected in (0, 1], found {self.mass}")
        if self.rule not in ("quantile", "row"):
            raise ValueError(f'rule is "quantile" or "row", found {quoted(self.rule)}')
        if self.mass is not None and self.rule != "quantile":
            raise ValueError(f"a mass decides row by row: leave the rule out, found {self.rule!r}")
        if self.floor < 0 or self.hold < 1:
            raise ValueError(f"expected floor >= 0 and hold >= 1, found {self.floor} and {self.hold}")

    @property
    def label(self) -> str:
        amount = f"{self.density:g}" if self.density is not None else f"mass {self.mass:g}"
        words = ("row" if self.rule == "row" else "", amount, f"hold {self.hold}" if self.hold > 1 else "")
        return " ".join(word for word in words if word)

    @property
    def expected_density(self) -> float | None:
        return self.density

    @property
    def reselect_every(self) -> int:
        return self.hold

    def starved(self, pattern: BlockPattern, layout: TokenLayout) -> Tensor | None:
        first, stop = video_blocks(layout)
        if self.floor or first >= stop:
            return None
        return starved_rows(pattern, 1, (first, stop)).double().mean() / (stop - first)

    def best(
        self, select: Callable[..., BlockPattern], call: AttentionCall, order: Order, device: torch.device
    ) -> BlockPattern:
        """The best pairs of a call.

        Args:
            select: `kernels.select.select` with its means, or `select_by_scores` with its scores.
            device: of these.
        """
        layout = call.layout
        first, stop = video_blocks(layout)
        if first >= stop:  # every block holds text, which is always read
            return BlockPattern.full(len(call.heads), layout.tokens, layout.keys, BLOCK, BLOCK, device=device)
        always = _forced(layout, order, self.diagonal, self.first_frame, device)
        return select(
            queries=layout.tokens,
            keys=layout.keys,
            density=self.density,
            mass=self.mass,
            rule=self.rule,
            always=always[:, : layout.key_blocks(BLOCK)],
            competing=(first, stop),
            floor=min(self.floor, stop - first),
            block_q=BLOCK,
            block_k=BLOCK,
        )


@kept(64)
def _forced(layout: TokenLayout, order: Order, diagonal: bool, first_frame: bool, device: torch.device) -> Tensor:
    """bool [query blocks, key blocks]: what is read whatever the map says."""
    always, _ = always_read(layout, first_frame and order.frame_major)
    blocks = len(always)
    forced = always.expand(blocks, blocks).clone()
    if diagonal:
        forced |= torch.eye(blocks, dtype=torch.bool)
    return forced.to(device)
