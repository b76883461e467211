"""First block caching (ParaAttention's FBCache): predict while the first block adds what it added when all ran."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from diffusers_accel.forwards.indicator import FIRST_BLOCK
from diffusers_accel.forwards.rule import SINCE_COMPUTED, Decision, Now
from diffusers_accel.forwards.rule_parts import TOO_FEW, check_count, check_threshold, fewest


@dataclass(frozen=True)
class FirstBlock:
    """What the first block adds to its tokens changes as what all of them add does. With r that residual and c the last
    computed step,

        change = mean|r - r_c| / mean|r_c|

    A step is predicted while change < threshold and no more than `max_skips` in a row are. The decision waits for the device
    once a step. `threshold=0` computes every step.

    Args:
        threshold: relative change at which the model runs again; 0 or more. diffusers takes 0.05.
        max_skips: most steps in a row that are predicted, 1 or more.
    """

    kind: ClassVar[str] = "firstblock"
    wants: ClassVar[frozenset[str]] = frozenset({FIRST_BLOCK, SINCE_COMPUTED})
    made_for: ClassVar[str | None] = None
    threshold: float = 0.05
    max_skips: int = 4

    def __post_init__(self) -> None:
        check_threshold(self.threshold)
        check_count("max_skips", self.max_skips, 1)

    @property
    def label(self) -> str:
        return f"firstblock {self.threshold:g}"

    @property
    def looks_back(self) -> int:
        return 1

    def check(self, steps: int) -> None:
        """Fits any number of steps."""

    def idle(self, steps: int) -> str | None:
        if not self.threshold or steps > 2:
            return None
        return TOO_FEW

    def least(self, steps: int) -> int:
        return fewest(steps, 1, self.max_skips + 1) if self.threshold else steps

    def decide(self, now: Now, carry: Any) -> Decision:
        r, computed = now.indicator, now.indicator_before
        if now.step - now.last.step > self.max_skips or r is None or computed is None or r.shape != computed.shape:
            return Decision(True)
        r, computed = r.float(), computed.float()
        change = float((r - computed).abs().mean() / computed.abs().mean())
        return Decision(not change < self.threshold)  # NaN computes
