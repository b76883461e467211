"""A polynomial through computed outputs, continued."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from diffusers_accel.files import quoted
from diffusers_accel.forwards.predictors.quantity import check_quantity, quantity, restore
from diffusers_accel.forwards.rule import Computed, Now


@dataclass(frozen=True)
class Taylor:
    """The polynomial through the last `order` + 1 computed forwards, continued (Newton's divided differences).

    Order 1 is linear extrapolation. While fewer forwards are known, the order is lower. TaylorSeer (arXiv 2503.06923) adds
    up the same differences as if they were derivatives, which agrees at order 1 and is not exact for polynomials above.

    Args:
        order: degree of the polynomial, 1 or more.
        of: "velocity" or "residual", as of `Last`.
        over: what it is a polynomial in: "timestep", the one that the model is given (in flow matching proportional to
            sigma), or "step", the index of the step. Two forwards of equal timestep count as no change.
    """

    kind: ClassVar[str] = "taylor"
    wants: ClassVar[frozenset[str]] = frozenset()
    order: int = 1
    of: str = "velocity"
    over: str = "timestep"

    def __post_init__(self) -> None:
        if isinstance(self.order, bool) or not isinstance(self.order, int) or self.order < 1:
            raise ValueError(f"order is the degree of a polynomial, expected 1 or more, found {quoted(self.order)}")
        check_quantity(self.of)
        if self.over not in ("timestep", "step"):
            raise ValueError(f'over: expected "timestep" or "step", found {quoted(self.over)}')

    @property
    def label(self) -> str:
        return f"{'linear' if self.order == 1 else f'taylor {self.order}'} {self.of}"

    @property
    def looks_back(self) -> int:
        return self.order + 1

    def predict(self, now: Now) -> Tensor:
        known = now.computed[-self.looks_back :][::-1]  # newest first
        at = [self._at(each) for each in known]
        differences = _divided([quantity(self.of, each) for each in known], at)
        value, factor = differences[0], torch.ones_like(at[0])
        for difference, place in zip(differences[1:], at):
            factor = factor * (self._at(now) - place)
            value = value + factor * difference
        return restore(self.of, value, now)

    def _at(self, call: Computed | Now) -> Tensor:
        return call.timestep.float() if self.over == "timestep" else call.timestep.new_tensor(call.step).float()


def _divided(values: Sequence[Tensor], at: Sequence[Tensor]) -> list[Tensor]:
    """Newton's divided differences f[0], f[0, 1], f[0, 1, 2], ... of values at these places."""
    column, found = list(values), [values[0]]
    for width in range(1, len(values)):
        column = [_ratio(column[i] - column[i + 1], at[i] - at[i + width]) for i in range(len(column) - 1)]
        found.append(column[0])
    return found


def _ratio(change: Tensor, distance: Tensor) -> Tensor:
    """change / distance, and 0 where the distance is: decided on the device, which nobody waits for."""
    return torch.where(distance == 0, torch.zeros_like(change), change / distance)
