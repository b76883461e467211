"""The chunk and the best of the history: FlashBlock's selection of external keys, by a low-resolution attention map."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from diffusers_accel.call import AttentionCall
from diffusers_accel.kernels.pattern import BlockPattern
from diffusers_accel.kernels.select import select
from diffusers_accel.methods.arrangement import arrangement, history_keys
from diffusers_accel.methods.blocks import BLOCK, check_density
from diffusers_accel.methods.historical import HistorySelect
from diffusers_accel.methods.order import Order
from diffusers_accel.methods.select import Inputs, Wants
from diffusers_accel.methods.uses import Tensors


@dataclass(frozen=True)
class TopHistory(HistorySelect):
    """The video's queries read all keys but the history's, and of the history the blocks that score best: as many in each row
    (the residual variant of FlashBlock, arXiv 2602.05305, whose text leaves the score open; ours is a draft's).

    Args:
        density: share of the history's blocks that a query block reads, in (0, 1]; at least one block.
    """

    density: float
    kind: ClassVar[str] = "top_history"
    wants: ClassVar[Wants] = "means"

    def __post_init__(self) -> None:
        check_density(self.density)

    @property
    def label(self) -> str:
        return f"{self.density:g}"

    def recalled(self, blocks: int) -> int:
        return max(1, round(self.density * blocks))

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
