"""The methods that users call by name, each a recipe that deals heads out without a search."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from diffusers_accel.methods.method import DENSE, Method
from diffusers_accel.methods.orders import AxisOrder
from diffusers_accel.methods.selects import Band


@dataclass(frozen=True)
class Recipe:
    """Which method each head takes when no search has said so.

    Args:
        heads: head h of every layer takes `heads[h % len(heads)]`.
        dense_steps: share of the schedule, from its start, that stays dense, in [0, 1].
        dense_layers: number of first layers that stay dense.
    """

    heads: tuple[Method, ...]
    dense_steps: float = 0.0
    dense_layers: int = 0

    def __post_init__(self) -> None:
        if not self.heads:
            raise ValueError("a recipe needs at least one method to deal out, found none")
        if not 0 <= self.dense_steps <= 1:
            raise ValueError(f"dense_steps is a share of the schedule, expected in [0, 1], found {self.dense_steps}")
        if self.dense_layers < 0:
            raise ValueError(f"dense_layers is a number of layers, expected 0 or more, found {self.dense_layers}")

    def method(self, layer: int, head: int) -> Method:
        return DENSE if layer < self.dense_layers else self.heads[head % len(self.heads)]


def dense() -> Recipe:
    """Every head dense: the very frames of the unpatched pipeline, for timing and for tests."""
    return Recipe(heads=(DENSE,))


def pattern(density: float = 0.5, dense_steps: float = 0.2, dense_layers: int = 0) -> Recipe:
    """Sparse-vDiT's patterns (arXiv 2506.03065) without its search.

    The paper decides each head's mode by profiling; without a plan no head's taste is known, so even heads take the band
    (nearby frames) and odd heads the band in "hwf" order (nearby positions through all frames), at equal density. A search
    does better: it finds which heads want which, which can be skipped and which must stay dense.

    Args:
        density: share of key blocks read, in (0, 1].
        dense_steps: share of the schedule that stays dense at its start, where the layout of the video is decided.
        dense_layers: number of first layers that stay dense.
    """
    heads = (Method(select=Band(density)), Method(order=AxisOrder("hwf"), select=Band(density)))
    return Recipe(heads=heads, dense_steps=dense_steps, dense_layers=dense_layers)


NAMED: dict[str, Callable[..., Recipe]] = {"dense": dense, "pattern": pattern}
