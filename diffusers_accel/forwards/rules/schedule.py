"""A fixed schedule: the steps that are computed, written down."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from diffusers_accel.files import quoted
from diffusers_accel.forwards.rule import Decision, Now


@dataclass(frozen=True)
class Schedule:
    """Computes these steps and predicts the others.

    Args:
        steps: their indices, from 0, in increasing order. They belong to one number of steps: a call whose schedule is too
            short for them is refused.
        shares: for any number of steps: shares of the schedule, in [0, 1) and increasing. Each stands for the step that it
            falls into. Give one of the two.
    """

    kind: ClassVar[str] = "schedule"
    wants: ClassVar[frozenset[str]] = frozenset()
    made_for: ClassVar[str | None] = None
    steps: tuple[int, ...] | None = None
    shares: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.shares is None):
            raise ValueError(
                f"a schedule takes either steps or shares, found steps={quoted(self.steps)} and shares={quoted(self.shares)}"
            )
        if self.steps is not None:
            object.__setattr__(self, "steps", _increasing("steps", self.steps, int, "indices from 0"))
        if self.shares is not None:
            object.__setattr__(self, "shares", _increasing("shares", self.shares, (int, float), "in [0, 1)"))
            if not all(share < 1 for share in self.shares):
                raise ValueError(f"shares: expected numbers in [0, 1), found {quoted(self.shares)}")

    @property
    def label(self) -> str:
        if self.steps is not None:
            return f"schedule of {len(self.steps)} steps"
        assert self.shares is not None
        return f"schedule of {len(self.shares)} shares"

    @property
    def looks_back(self) -> int:
        return 1

    def check(self, steps: int) -> None:
        if self.steps and self.steps[-1] >= steps:
            raise ValueError(
                f"the schedule computes step {self.steps[-1]}, but this call has {steps} steps (0 to {steps - 1}): pass "
                "shares=[...] to fit any number of steps, or the number of steps that it was made for"
            )

    def idle(self, steps: int) -> str | None:
        if self.computes(steps).issuperset(range(1, steps - 1)):
            return "the first and the last one compute in any case, and all that lie between are listed: leave some out"
        return None

    def least(self, steps: int) -> int:
        return len({*self.computes(steps), 0, steps - 1})

    def decide(self, now: Now, carry: Any) -> Decision:
        return Decision(now.step in self.computes(now.steps))

    def computes(self, steps: int) -> frozenset[int]:
        """The indices of the steps that are computed, in a schedule of so many."""
        if self.steps is not None:
            return frozenset(self.steps)
        assert self.shares is not None
        return frozenset(int(share * steps) for share in self.shares)


def _increasing(name: str, values: Any, types: Any, expected: str) -> tuple[Any, ...]:
    if not isinstance(values, Sequence) or isinstance(values, str):
        raise ValueError(f"{name}: expected a list of numbers, found {quoted(values)}")
    good = all(isinstance(value, types) and not isinstance(value, bool) and value >= 0 for value in values)
    if not good or any(a >= b for a, b in zip(values, values[1:])):
        raise ValueError(f"{name}: expected {expected}, each larger than the one before, found {quoted(list(values))}")
    return tuple(values)
