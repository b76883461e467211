"""No query reads anything."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from diffusers_accel.call import AttentionCall
from diffusers_accel.layout import TokenLayout
from diffusers_accel.methods.blocks import BLOCK
from diffusers_accel.methods.order import Order
from diffusers_accel.methods.select import StaticSelect
from diffusers_accel.methods.uses import Tensors


@dataclass(frozen=True)
class Skip(StaticSelect):
    """The output of the head is 0 (Sparse-vDiT's M1, arXiv 2506.03065)."""

    kind: ClassVar[str] = "skip"
    reads_nothing: ClassVar[bool] = True

    def expected_density(self, order: Order, layout: TokenLayout | None = None) -> float:
        return 0.0

    def refuses(self, order: Order) -> str | None:
        return (
            None
            if order.identity
            else f'"{self.kind}" reads the same in every order: leave the order out, found {order}'
        )

    def mask(self, call: AttentionCall, order: Order, tensors: Tensors) -> Tensor:
        return torch.zeros(1, call.layout.query_blocks(BLOCK), call.layout.blocks(BLOCK), dtype=torch.bool)
