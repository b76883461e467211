"""What a tuning has found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from diffusers_accel.evals.measurement import Spread
from diffusers_accel.evals.report import Report
from diffusers_accel.plan import Plan
from diffusers_accel.tune.goal import Goal


@dataclass(frozen=True)
class Proof:
    """What the plan did on prompts that no part of the search has seen.

    Args:
        speedup: of a whole generation, mean over clips.
        value: mean of the goal's metric; `spread` its 95 % interval, where there are clips enough.
    """

    speedup: float
    value: float
    spread: Spread | None
    clips: int

    def to_json(self, metric: str) -> dict[str, Any]:
        interval = [self.spread.low, self.spread.high] if self.spread and self.spread.low is not None else None
        return {"speedup": self.speedup, metric: self.value, "interval": interval, "clips": self.clips}


@dataclass(frozen=True)
class Tuned:
    """A plan, and what was seen of it.

    Args:
        goal: what was asked.
        plan: the plan; its provenance has the numbers too, "tuned".
        report: of the clips that decided, or of those that were held out, where there are any.
        proof: the numbers of that report.
        met: whether the goal is met; None: the clips cannot tell.
        verdict: that in words.
    """

    goal: Goal
    plan: Plan
    report: Report
    proof: Proof
    met: bool | None
    verdict: str
