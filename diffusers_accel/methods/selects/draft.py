"""DraftAttention's selection (arXiv 2505.14708): a low-resolution attention map says which blocks are worth computing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from diffusers_accel.call import AttentionCall
from diffusers_accel.files import quoted
from diffusers_accel.kernels.kept import kept
from diffusers_accel.kernels.pattern import BlockPattern
from diffusers_accel.kernels.select import select
from diffusers_accel.layout import TokenLayout
from diffusers_accel.methods.arrangement import Blocks, arrangement
from diffusers_accel.methods.blocks import BLOCK, check_density
from diffusers_accel.methods.order import Order
from diffusers_accel.methods.select import Inputs, Select, Wants
from diffusers_accel.methods.uses import Tensors


@dataclass(frozen=True)
class Draft(Select):
    """Blocks are averaged, their softmax map stands for the full one, and the best block pairs are read.

    The paper keeps the best share of a head's whole map (rule "quantile"), whose rows may be empty, forces nothing but text
    and selects anew at every call. That is `Draft(density, floor=0, diagonal=False, first_frame=False)` in patches of 8 x 16.
    By default rows here read at least one block, and the diagonal and the first frame are always read, within the density.

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
    kind: ClassVar[str] = "draft"
    wants: ClassVar[Wants] = "means"

    def __post_init__(self) -> None:
        if (self.density is None) == (self.mass is None):
            raise ValueError(
                f"a draft takes either a density or a mass, found density {self.density} and mass {self.mass}; "
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

    def starved(self, pattern: BlockPattern, order: Order, layout: TokenLayout) -> Tensor | None:
        places = arrangement(order, layout)
        (first, stop), (start, end) = places.video_queries, places.video_keys
        if self.floor or first == stop or start == end:
            return None
        blocks, counts = pattern.blocks[:, :, first:stop], pattern.counts[:, :, first:stop]
        listed = torch.arange(blocks.shape[3], device=blocks.device) < counts[..., None]
        return 1 - (listed & (blocks >= start) & (blocks < end)).any(-1).double().mean()

    def pattern(self, call: AttentionCall, order: Order, tensors: Tensors, inputs: Inputs) -> BlockPattern:
        assert inputs.means is not None
        q_means, k_means = inputs.means
        layout = call.layout
        always, rows, columns = _forced(layout, order, self.diagonal, self.first_frame, q_means.device)
        if rows == (0, 0) or columns == (0, 0):  # every block holds exact tokens, which all read
            heads = q_means.shape[2]
            return BlockPattern.full(heads, layout.queries, layout.keys, BLOCK, BLOCK, device=q_means.device)
        return select(
            q_means,
            k_means,
            queries=layout.queries,
            keys=layout.keys,
            density=self.density,
            mass=self.mass,
            rule=self.rule,
            always=always,
            competing=columns,
            competing_queries=rows,
            floor=min(self.floor, columns[1] - columns[0]),
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
