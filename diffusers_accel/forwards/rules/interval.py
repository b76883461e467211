"""A fixed interval: one step in so many is computed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from diffusers_accel.forwards.rule import Decision, Now
from diffusers_accel.forwards.rule_parts import TOO_FEW, check_count, check_share, fewest


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
        check_count("every", self.every, 1)
        check_share("retention", self.retention)

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
            return TOO_FEW
        return (
            f"its retention={self.retention:g} computes the first {self._retained(steps)}, and the last one computes in any "
            "case: give it a smaller one"
        )

    def least(self, steps: int) -> int:
        return fewest(steps, max(self._retained(steps), 1), self.every)

    def _retained(self, steps: int) -> int:
        """How many steps at the start of a schedule compute."""
        return int(self.retention * steps)

    def decide(self, now: Now, carry: Any) -> Decision:
        return Decision(now.step < self._retained(now.steps) or now.step - now.last.step >= self.every)
