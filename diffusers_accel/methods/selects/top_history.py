"""The chunk and the best of the history: FlashBlock's selection of external keys, by a low-resolution attention map."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from diffusers_accel.call import AttentionCall
from diffusers_accel.kernels.pattern import BlockPattern
from diffusers_accel.kernels.select import select
from diffusers_accel.layout import TokenLayout
from diffusers_accel.methods.arrangement import arrangement, history_keys
from diffusers_accel.methods.blocks import BLOCK, check_density
from diffusers_accel.methods.order import Order
from diffusers_accel.methods.select import Inputs, Select, Wants
from diffusers_accel.methods.uses import Tensors


@dataclass(frozen=True)
class TopHistory(Select):
    """The video's queries read all keys but the history's, and of the history the blocks that score best: as many in each row
    (the residual variant of FlashBlock, arXiv 2602.05305, whose text leaves the score open; ours is a draft's).

    Args:
        density: share of the history's blocks that a query block reads, in (0, 1]; at least one block.
    """

    density: float
    kind: ClassVar[str] = "top_history"
    wants: ClassVar[Wants] = "means"
    needs_history: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_density(self.density)

    @property
    def label(self) -> str:
        return f"{self.density:g}"

    def reads_all_in(self, order: Order, layout: TokenLayout) -> bool:
        return history_keys(order, layout) == (0, 0)

    def refuses(self, order: Order) -> str | None:
        return (
            None
            if order.identity
            else f'"{self.kind}" reads the history in the order of the model: leave the order out, found {order}'
        )

    def expected_density(self, order: Order, layout: TokenLayout | None = None) -> float | None:
        if layout is None:
            return None
        first, stop = history_keys(order, layout)
        return 1 - (stop - first - _blocks(self.density, stop - first)) / layout.key_blocks(BLOCK)

    def pattern(self, call: AttentionCall, order: Order, tensors: Tensors, inputs: Inputs) -> BlockPattern:
        assert inputs.means is not None
        layout, places = call.layout, arrangement(order, call.layout)
        history = history_keys(order, layout)
        if history == (0, 0) or places.video_queries == (0, 0):  # every block is read by all
            return BlockPattern.full(len(call.heads), layout.queries, layout.keys, BLOCK, BLOCK, device=inputs.device)
        return select(
            *inputs.means,
            queries=layout.queries,
            keys=layout.keys,
            density=self.density,
            per="row",
            competing=history,
            competing_queries=places.video_queries,
            block_q=BLOCK,
            block_k=BLOCK,
        )


def _blocks(density: float, blocks: int) -> int:
    """How many of the history's blocks are read."""
    return min(max(1, round(density * blocks)), blocks)
