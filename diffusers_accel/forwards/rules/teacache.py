"""TeaCache (arXiv 2411.19108): predict while an indicator of the step, scaled by a fitted polynomial, has changed little."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from diffusers_accel.files import quoted
from diffusers_accel.forwards.rule import GUIDE, NOISE, SINCE_COMPUTED, VIDEO, Decision, Now
from diffusers_accel.forwards.rule_parts import TOO_FEW, check_count, check_threshold, is_number


@dataclass(frozen=True)
class TeaCache:
    """How far the output of a model changes follows from how far an indicator does, which is known before its blocks run: an
    embedding of the timestep, or the tokens that go into its first self-attention. The polynomial between the two is fitted for
    each model.

    With m the indicator and means over all values,

        change = mean|m - m of the step before| / mean|m of the step before|        error += polynomial(change)

    A step is predicted while error < threshold; a step that computes sets it to 0. The decision waits for the device once a
    step. `threshold=0` computes every step.

    Args:
        coefficients: of the polynomial, that of the highest degree first, of any degree; `forwards/teacache_tables.py` has the
            authors'. (1, 0) adds up the change itself.
        threshold: added up change at which the model runs again; 0 or more.
        warm_up: number of first steps of a generation that compute; 0 or more.
        indicator: "tokens", or one that the family has: "time" (the embedding of the timestep) or "time_projection" (what
            modulates the blocks). Those of the timestep are the same for every prompt, so the schedule is too.
        made_for: the model of the coefficients, such as "wan, 30 layers of 12 heads": others are refused. None: any.
    """

    kind: ClassVar[str] = "teacache"
    coefficients: tuple[float, ...]
    threshold: float = 0.1
    warm_up: int = 1
    indicator: str = "tokens"
    made_for: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "coefficients", _numbers(self.coefficients))
        check_threshold(self.threshold)
        check_count("warm_up", self.warm_up, 0)
        if not isinstance(self.indicator, str) or self.indicator in (NOISE, VIDEO, GUIDE, SINCE_COMPUTED, ""):
            raise ValueError(f'indicator: expected a name such as "tokens" or "time", found {quoted(self.indicator)}')
        if self.made_for is not None and not isinstance(self.made_for, str):
            raise ValueError(f"made_for: expected the name of a model or None, found {quoted(self.made_for)}")

    @property
    def label(self) -> str:
        return f"teacache {self.threshold:g}"

    @property
    def wants(self) -> frozenset[str]:
        return frozenset({self.indicator})

    @property
    def looks_back(self) -> int:
        return 1

    def check(self, steps: int) -> None:
        """Fits any number of steps."""

    def idle(self, steps: int) -> str | None:
        first = max(self.warm_up, 1)
        if not self.threshold or first < steps - 1:
            return None
        if steps < 3:
            return TOO_FEW
        return (
            f"its warm_up computes the first {self.warm_up}, and the last one computes in any case: give it a smaller one, or "
            f"run {first + 2} steps or more"
        )

    def least(self, steps: int) -> int:
        return min(steps, max(self.warm_up, 1) + 1) if self.threshold else steps

    def decide(self, now: Now, carry: Any) -> Decision:
        m, before = now.indicator, now.indicator_before
        if not self.threshold or now.run < self.warm_up or m is None or before is None or m.shape != before.shape:
            return Decision(True)
        m, before = m.float(), before.float()
        error = (carry or 0.0) + self.scaled(float((m - before).abs().mean() / before.abs().mean()))
        return Decision(False, error) if error < self.threshold else Decision(True)  # NaN computes

    def scaled(self, change: float) -> float:
        """The polynomial, at a relative change of the indicator."""
        value = 0.0
        for coefficient in self.coefficients:
            value = value * change + coefficient
        return value


def _numbers(values: Any) -> tuple[float, ...]:
    good = isinstance(values, Sequence) and not isinstance(values, str) and len(values) > 0
    if not good or not all(is_number(value) for value in values):
        raise ValueError(
            "coefficients: expected the numbers of a polynomial, that of the highest degree first, found "
            f"{quoted(values)}"
        )
    return tuple(float(value) for value in values)
