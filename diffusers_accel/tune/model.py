"""What clips have shown of the search's predictions: by how much its errors and its times are off."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from diffusers_accel.search.assignment import NO_CORRECTION, Assignment, Correction
from diffusers_accel.search.steps.choice import StepChoice
from diffusers_accel.tune.goal import POWERS, Goal

PRIOR = (
    0.1  # weight of the belief that errors of heads and of predicted steps are off by the same factor, against one clip
)
LEAST = 1e-12  # error that is told from none
WIDE = math.log(2)  # losses that lie less apart tell nothing of how they grow with the error


@dataclass(frozen=True)
class Attempt:
    """A plan that was generated with.

    Args:
        assignment: what it was made of, and was expected to do.
        speedup: measured, of a whole generation.
        psnr: mean over the clips, in dB.
        value: mean of the goal's metric.
    """

    assignment: Assignment
    speedup: float
    psnr: float
    value: float

    @property
    def computed(self) -> int | None:
        """How many steps it computes; None: all."""
        return computed(self.assignment.steps)


def computed(steps: StepChoice | None) -> int | None:
    """How many steps are computed; None: all, without a step cache."""
    return len(steps.computed) if steps else None


@dataclass(frozen=True)
class Model:
    """Predictions, corrected.

    Args:
        correction: with it, `Assignment.total` is the mean squared error of the clips, of values in 0..1.
        slow: by number of computed steps: measured time / expected time; of the numbers that were not tried `usual`.
        usual: see `slow`.
        offset, power: log(loss) = offset + power * log(total).
    """

    correction: Correction
    slow: Mapping[int | None, float]
    usual: float
    offset: float
    power: float

    @classmethod
    def of(cls, history: Sequence[Attempt], goal: Goal) -> Model:
        """Of what was tried, one plan at least, the latest last."""
        correction = _correction(history)
        ratios: dict[int | None, list[float]] = {}
        for each in history:  # of a noisy clock the mean tells more than the latest time
            ratios.setdefault(each.computed, []).append(each.assignment.speedup / each.speedup)
        slow = {count: statistics.geometric_mean(some) for count, some in ratios.items()}
        totals = np.log([max(each.assignment.total(correction), LEAST) for each in history])
        losses = np.log([goal.loss(each.value) for each in history])
        power = POWERS[goal.metric]
        if len(history) > 2 and min(np.ptp(totals), np.ptp(losses)) > WIDE:
            power = float(np.clip(np.polyfit(totals, losses, 1)[0], 0.5 * power, 1.5 * power))
        offset = float(np.mean(losses - power * totals))
        return cls(correction, slow, statistics.median(slow.values()), offset, power)

    def factor(self, steps: StepChoice | None) -> float:
        """Measured time / expected time, of plans with such a choice of steps."""
        return self.slow.get(computed(steps), self.usual)

    def loss(self, error: float) -> float:
        """The expected loss of the goal's metric, of a plan with this corrected error."""
        return math.exp(self.offset + self.power * math.log(max(error, LEAST)))


NOTHING = Model(NO_CORRECTION, {}, 1.0, 0.0, 1.0)  # before anything was tried


def _correction(history: Sequence[Attempt]) -> Correction:
    """Factors with which errors of heads and of predicted steps add up to the clips' squared error: least squares of the
    relative deviation, both 0 or more, drawn towards one common factor where the clips do not tell them apart."""
    from scipy.optimize import nnls  # of the extra `eval`

    errors = np.array(
        [[each.assignment.heads_error, each.assignment.total() - each.assignment.heads_error] for each in history]
    )
    seen = np.array([10 ** (-each.psnr / 10) for each in history])
    told = errors.sum(1) > 0
    if not told.any():
        return Correction()
    errors, seen = errors[told], seen[told]
    common = float(np.exp(np.mean(np.log(seen / errors.sum(1)))))
    rows = np.vstack([errors / seen[:, None], PRIOR * np.eye(2) / common])
    heads, forwards = nnls(rows, np.array([*np.ones(len(seen)), PRIOR, PRIOR]))[0]
    return Correction(float(heads), float(forwards))
