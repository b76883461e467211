"""PAROAttention's selection (arXiv 2506.16054): block masks found offline, per head and part of the schedule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from diffusers_accel.methods.context import Context
from diffusers_accel.methods.orders import Order
from diffusers_accel.methods.reuse import part_of
from diffusers_accel.methods.selects import BLOCK, always_read, check_density


@dataclass(frozen=True)
class Stored:
    """The blocks that got most attention during the search, for the size that it searched.

    The softmax goes over the blocks that are read. The paper's own reference instead zeroes blocks after the softmax over
    all of them, its kernel does as we do. Text blocks are always read, whatever is stored.

    Args:
        density: share of the block pairs that the search kept, in (0, 1]. With the order it names the plan's tensors
            "stored_bits/<order>/<density>/<transformer>", uint8 [masks, parts, query blocks, ceil(key blocks / 8)] (bits in
            numpy's little order, parts: equal parts of the schedule), and "stored_heads/...", int32 [layers, heads]: which
            mask a head takes, -1 for none.
    """

    density: float
    kind: ClassVar[str] = "stored"

    def __post_init__(self) -> None:
        check_density(self.density)

    @property
    def label(self) -> str:
        return f"{self.density:g}"

    def names(self, order: Order, transformer: str) -> tuple[str, str]:
        """Names of the two tensors: bits, heads."""
        key = f"{order.label}/{self.density:g}/{transformer}"
        return f"stored_bits/{key}", f"stored_heads/{key}"

    def part(self, ctx: Context, order: Order) -> int:
        """Which part's masks hold at the running step."""
        parts = self._tensor(ctx, self.names(order, ctx.transformer)[0]).shape[1]
        if parts == 1:
            return 0
        if ctx.now is None:
            raise RuntimeError(
                "stored masks change along the schedule, but neither the pipeline nor the model says which step runs: "
                "call Patch.step(i, steps) before each step of your own loop, or patch the pipeline"
            )
        return part_of(ctx.now, parts)

    def mask(self, ctx: Context, order: Order) -> Tensor:
        """bool [heads, query blocks, key blocks], in `order`."""
        bits_name, heads_name = self.names(order, ctx.transformer)
        bits, index = self._tensor(ctx, bits_name), self._tensor(ctx, heads_name)[ctx.layer, list(ctx.heads)]
        if bool((index < 0).any()):
            head = ctx.heads[int((index < 0).nonzero()[0])]
            raise ValueError(f"{heads_name} has no mask for head {head} of layer {ctx.layer}: search the plan again")
        blocks = ctx.layout.blocks(BLOCK)
        if bits.shape[2] != blocks or bits.shape[3] != -(-blocks // 8):
            raise ValueError(
                f"the plan's stored masks are for {bits.shape[2]} blocks of {BLOCK} tokens, this call has {blocks}: stored "
                "masks hold for the size that was searched; search a plan for this one"
            )
        chosen = bits[index.long(), self.part(ctx, order)].numpy()
        mask = torch.from_numpy(np.unpackbits(chosen, axis=-1, count=blocks, bitorder="little").astype(bool))
        _, text = always_read(ctx.layout, first_frame=False)
        mask[:, text] = True
        mask[:, :, text] = True
        return mask

    @staticmethod
    def _tensor(ctx: Context, name: str) -> Tensor:
        if name not in ctx.tensors:
            raise ValueError(f"a stored mask needs the tensor {name!r} of a searched plan, found {sorted(ctx.tensors)}")
        return ctx.tensors[name]


def packed(masks: Tensor) -> Tensor:
    """bool [..., key blocks] as uint8 [..., ceil(key blocks / 8)]."""
    return torch.from_numpy(np.packbits(masks.cpu().numpy(), axis=-1, bitorder="little"))
