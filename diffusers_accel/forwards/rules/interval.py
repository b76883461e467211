"""A fixed interval: one step in so many is computed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from diffusers_accel.files import quoted
from diffusers_accel.forwards.rule import Decision, Now


@dataclass(frozen=True)
class Interval:
    """Computes the first steps, then each step that is `every` after the last computed one. `every=1` computes all.

    Args:
        every: 1 or more.
        retention: share of the schedule, from its start, that computes, in [0, 1].
    """

    kind: ClassVar[str] = "interval"
    wants: ClassVar[frozenset[str]] = frozenset()
    made_for: ClassVar[str | None] = None
    every: int = 2
    retention: float = 0.2

    def __post_init__(self) -> None:
        if isinstance(self.every, bool) or not isinstance(self.every, int) or self.every < 1:
            raise ValueError(
                f"every is a number of steps, expected an integer of 1 or more, found {quoted(self.every)}"
            )
        given: Any = self.retention
        if isinstance(given, bool) or not isinstance(given, (int, float)) or not 0 <= given <= 1:
            raise ValueError(f"retention is a share of the schedule, expected in [0, 1], found {quoted(given)}")

    @property
    def label(self) -> str:
        return f"every {self.every} steps"

    @property
    def looks_back(self) -> int:
        return 1

    def check(self, steps: int) -> None:
        """Fits any number of steps."""

    def idle(self, steps: int) -> str | None:
        if self.every == 1 or max(self._retained(steps), 1) < steps - 1:
            return None
        if steps < 3:
            return "the first step and the last one compute in any case: run 3 steps or more"
        return (
            f"its retention={self.retention:g} computes the first {self._retained(steps)}, and the last one computes in any "
            "case: give it a smaller one"
        )

    def least(self, steps: int) -> int:
        first = max(self._retained(steps), 1)
        between = max(steps - first - 1, 0)  # before the last one
        return min(steps, first + between // self.every + 1)

    def _retained(self, steps: int) -> int:
        """How many steps at the start of a schedule compute."""
        return int(self.retention * steps)

    def decide(self, now: Now, carry: Any) -> Decision:
        return Decision(now.step < self._retained(now.steps) or now.step - now.last.step >= self.every)
