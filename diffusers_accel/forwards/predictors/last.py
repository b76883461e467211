"""The last computed output, or what the model then added to its input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from diffusers_accel.forwards.predictors.quantity import check_quantity, quantity, restore
from diffusers_accel.forwards.rule import Now


@dataclass(frozen=True)
class Last:
    """What was computed last.

    Args:
        of: "velocity", the output as it was, v = v_c; or "residual", what the model added to its input, v = x + (v - x)_c.
    """

    kind: ClassVar[str] = "last"
    wants: ClassVar[frozenset[str]] = frozenset()
    of: str = "residual"

    def __post_init__(self) -> None:
        check_quantity(self.of)

    @property
    def label(self) -> str:
        return f"last {self.of}"

    @property
    def looks_back(self) -> int:
        return 1

    def predict(self, now: Now) -> Tensor:
        return restore(self.of, quantity(self.of, now.last), now)
