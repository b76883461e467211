"""PAROAttention's selection (arXiv 2506.16054): block masks found offline, per head and segment of the schedule."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from diffusers_accel.call import AttentionCall
from diffusers_accel.layout import TokenLayout
from diffusers_accel.methods.arrangement import arrangement
from diffusers_accel.methods.blocks import BLOCK, check_density, segment_of
from diffusers_accel.methods.order import Order
from diffusers_accel.methods.select import StaticSelect
from diffusers_accel.methods.selects.stored_check import check_call, check_masks, refuses_layout
from diffusers_accel.methods.uses import Tensors, Uses, planned


@dataclass(frozen=True)
class Stored(StaticSelect):
    """The blocks that got most attention during the search, for the size that it searched.

    The softmax goes over the blocks that are read. The paper's own reference instead zeroes blocks after the softmax over
    all of them, its kernel does as we do. Text blocks are always read, whatever is stored.

    Args:
        density: share of the block pairs that the search kept, in (0, 1]. With the order it names the plan's tensors
            "stored_bits/<order>/<density>/<transformer>", uint8 [masks, segments, query blocks, ceil(key blocks / 8)] (bits in
            numpy's little order, segments: equal segments of the schedule), and "stored_heads/...", int32 [layers, heads]: which
            mask a head takes, -1 for none.
    """

    density: float
    kind: ClassVar[str] = "stored"

    def __post_init__(self) -> None:
        check_density(self.density)

    @property
    def label(self) -> str:
        return f"{self.density:g}"

    def expected_density(self, order: Order, layout: TokenLayout | None = None) -> float:
        return self.density

    @property
    def records(self) -> str | None:
        return "stored masks"

    def names(self, order: Order, transformer: str) -> tuple[str, str]:
        """Names of the two tensors: bits, heads."""
        key = f"{order.label}/{self.density:g}/{transformer}"
        return f"stored_bits/{key}", f"stored_heads/{key}"

    def refuses(self, order: Order) -> str | None:
        return None if order.storable else f"masks are stored for the six axis orders, found the order {order.label}"

    def depends(self, call: AttentionCall, order: Order, tensors: Tensors) -> Hashable:
        """The layer, and which segment's masks hold at the running step."""
        segments = self._segments(order, call.transformer, tensors)
        if segments == 1:
            return call.place, 0
        if call.now is None:
            raise RuntimeError(
                "stored masks change along the schedule, but neither the pipeline nor the model says which step runs: "
                "call Patch.step(i, steps) before each step of your own loop, or patch the pipeline"
            )
        return call.place, segment_of(call.now, segments)

    def changes(self, order: Order, transformer: str, tensors: Tensors) -> bool:
        return self._segments(order, transformer, tensors) > 1

    def owners(self, call: AttentionCall, order: Order, tensors: Tensors) -> Tensor:
        heads = planned(tensors, self.names(order, call.transformer)[1], "a stored mask")
        return heads[call.layer, list(call.heads)] >= 0

    def check(self, order: Order, uses: Uses, tensors: Tensors) -> None:
        bits, heads = ((name, uses.tensor(tensors, name)) for name in self.names(order, uses.transformer))
        check_masks(order, uses, bits, heads)

    def made_for(self, order: Order, transformer: str, tensors: Tensors) -> tuple[int, ...]:
        """Segments of the schedule and blocks."""
        bits = tensors[self.names(order, transformer)[0]]
        return bits.shape[1], bits.shape[2]

    def check_layout(self, order: Order, uses: Uses, tensors: Tensors, layout: TokenLayout) -> None:
        bits, heads = (uses.tensor(tensors, name) for name in self.names(order, uses.transformer))
        check_call(order, uses, bits, heads, layout)

    def mask(self, call: AttentionCall, order: Order, tensors: Tensors) -> Tensor:
        bits_name, heads_name = self.names(order, call.transformer)
        bits = planned(tensors, bits_name, "a stored mask")
        index = planned(tensors, heads_name, "a stored mask")[call.layer, list(call.heads)]
        if bool((index < 0).any()):
            head = call.heads[int((index < 0).nonzero()[0])]
            raise ValueError(f"{heads_name} has no mask for head {head} of layer {call.layer}: search the plan again")
        if reason := refuses_layout(call.layout):
            raise ValueError(reason)
        blocks = call.layout.blocks(BLOCK)
        if bits.shape[2] != blocks or bits.shape[3] != -(-blocks // 8):
            raise ValueError(
                f"the plan's stored masks are for {bits.shape[2]} blocks of {BLOCK} tokens, this call has {blocks}: stored "
                "masks hold for the size that was searched; search a plan for this one"
            )
        segment = 0 if bits.shape[1] == 1 or call.now is None else segment_of(call.now, bits.shape[1])
        chosen = bits[index.long(), segment].numpy()
        mask = torch.from_numpy(np.unpackbits(chosen, axis=-1, count=blocks, bitorder="little").astype(bool))
        exact = arrangement(order, call.layout).exact_keys
        mask[:, exact] = True
        mask[:, :, exact] = True
        return mask

    def _segments(self, order: Order, transformer: str, tensors: Tensors) -> int:
        return planned(tensors, self.names(order, transformer)[0], "a stored mask").shape[1]


def packed(masks: Tensor) -> Tensor:
    """bool [..., key blocks] as uint8 [..., ceil(key blocks / 8)]."""
    return torch.from_numpy(np.packbits(masks.cpu().numpy(), axis=-1, bitorder="little"))
