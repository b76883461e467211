"""Selections for video that is made chunk by chunk: they read all but the history, and of that so many blocks."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from diffusers_accel.layout import TokenLayout
from diffusers_accel.methods.arrangement import history_keys
from diffusers_accel.methods.blocks import BLOCK
from diffusers_accel.methods.order import Order
from diffusers_accel.methods.select import Select


@dataclass(frozen=True)
class HistorySelect(Select):
    """A member says how many blocks of the history a query block of the video reads, and which."""

    needs_history: ClassVar[bool] = True

    @abstractmethod
    def recalled(self, blocks: int) -> int:
        """How many are read of a history of so many blocks, 1 or more."""

    def reads_all_in(self, order: Order, layout: TokenLayout) -> bool:
        return history_keys(order, layout) == (0, 0)

    def refuses(self, order: Order) -> str | None:
        if order.identity:
            return None
        return f'"{self.kind}" keeps the order of the model: leave the order out, found {order}'

    def expected_density(self, order: Order, layout: TokenLayout | None = None) -> float | None:
        if layout is None:
            return None
        first, stop = history_keys(order, layout)
        history = stop - first
        return 1 - (history - self.recalled(history)) / layout.key_blocks(BLOCK) if history else 1.0
