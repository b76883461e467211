"""The chunk: everything but the history is read. FlashBlock's internal attention, for video that is made chunk by chunk."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from diffusers_accel.call import AttentionCall
from diffusers_accel.methods.arrangement import arrangement, history_keys
from diffusers_accel.methods.historical import HistorySelect
from diffusers_accel.methods.order import Order
from diffusers_accel.methods.select import StaticSelect
from diffusers_accel.methods.uses import Tensors


@dataclass(frozen=True)
class ChunkOnly(HistorySelect, StaticSelect):
    """The video's queries read all keys but those of the history: the chunk that is denoised, text and whatever else there is
    (FlashBlock, arXiv 2602.05305).

    With the rest `Kept` the attention over the history is that of an earlier step, as in the paper. Blocks that hold tokens of
    both are read, so that nothing of the chunk is ever kept.
    """

    kind: ClassVar[str] = "chunk"

    def recalled(self, blocks: int) -> int:
        return 0

    def mask(self, call: AttentionCall, order: Order, tensors: Tensors) -> Tensor:
        places = arrangement(order, call.layout)
        mask = torch.ones(len(places.exact_queries), len(places.exact_keys), dtype=torch.bool)
        mask[~places.exact_queries, slice(*history_keys(order, call.layout))] = False
        return mask[None]
