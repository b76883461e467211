"""One budget over both scopes: for each choice of computed steps the front of the heads' errors over their time.

A front is walked once (`search.knapsack`); what any speed-up costs is then read off it, for all choices of steps at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from diffusers_accel.forwards import Forwards
from diffusers_accel.methods import Method
from diffusers_accel.search.assignment import (
    NO_CORRECTION,
    Assignment,
    Correction,
    Tables,
    build_tables,
    dense_time,
    find_weights,
    least_error,
    summary,
)
from diffusers_accel.search.cost import Cost
from diffusers_accel.search.coverage import Coverage
from diffusers_accel.search.knapsack import front
from diffusers_accel.search.reach import OutOfReach
from diffusers_accel.search.scores import Array, Scores
from diffusers_accel.search.step_options import StepOptions
from diffusers_accel.search.steps.choice import StepChoice


@dataclass(frozen=True)
class Expected:
    """A choice of steps, with what the heads would cost beside it.

    Args:
        steps: None: every step is computed.
        speedup: that is asked of it by the predicted times.
        heads_error: of the best choice of heads then.
        error: of both scopes, corrected.
    """

    steps: StepChoice | None
    speedup: float
    heads_error: float
    error: float

    @property
    def computed(self) -> int | None:
        """How many steps are computed; None: all, without a step cache."""
        return len(self.steps.computed) if self.steps else None


class Joint:
    """All pairs of a choice of steps and of heads.

    Args:
        scores, cost: as of `assign`; all spans have to be measured where there are step caches to choose from.
        steps: None: every step is computed.
        dense_steps, among, exact: as of `assign`.

    Raises:
        ValueError: spans were not measured, so that errors of heads and of predicted steps have no common unit.
    """

    def __init__(
        self,
        scores: Scores,
        cost: Cost,
        steps: StepOptions | None,
        dense_steps: float = 0.0,
        among: Collection[Method] | None = None,
        exact: bool = False,
    ) -> None:
        if steps is not None and len(scores.impacts) < len(scores.spans):
            raise ValueError(
                "steps: expected scores whose spans were measured, by which errors of heads and of predicted steps are compared; "
                "search without step caches"
            )
        self._exact = exact
        self._scores, self._steps = scores, steps or StepOptions((), tuple(scores.models), 1.0)
        self._weights = find_weights(scores, None)
        self._tables = build_tables(scores, cost, self._weights, dense_steps, among)
        choices = [None, *(each for each in self._steps.choices if self._steps.computes_first(each, dense_steps))]
        fronts: dict[
            tuple[int, ...] | None, tuple[Array, Array]
        ] = {}  # the heads' are those of the steps that are computed
        for chosen in choices:
            computed = chosen.computed if chosen else None
            if computed not in fronts:
                fronts[computed] = self._front(self._covered(chosen))
        self._fronts = [(chosen, *fronts[chosen.computed if chosen else None]) for chosen in choices]

    @property
    def steps(self) -> StepOptions:
        """What there is to choose from, with what was learned."""
        known = {chosen.forwards: chosen for chosen, _, _ in self._fronts if chosen}
        return replace(self._steps, choices=tuple(known.get(each.forwards, each) for each in self._steps.choices))

    def learn(self, errors: Mapping[Forwards, float]) -> None:
        """Sets the errors of choices of steps that were measured since."""

        def learned(chosen: StepChoice | None) -> StepChoice | None:
            known = chosen is not None and chosen.forwards in errors
            return replace(chosen, error=errors[chosen.forwards], measured=True) if chosen and known else chosen

        self._fronts = [(learned(chosen), ratios, wrong) for chosen, ratios, wrong in self._fronts]

    def ranked(
        self,
        speedup: float,
        correction: Correction = NO_CORRECTION,
        slow: Callable[[StepChoice | None], float] = lambda steps: 1.0,
        measured_first: bool = False,
    ) -> list[Expected]:
        """Every choice of steps with which a generation is so many times as fast, that of the least expected error first.

        Args:
            correction: of the errors.
            slow: real time / predicted time with a choice of steps.
            measured_first: choices of steps whose errors are only predicted come last.

        Raises:
            OutOfReach: there is none.
        """
        found = []
        for chosen, ratios, errors in self._fronts:
            asked = max(1.0, speedup * slow(chosen))
            ratio = self._steps.attention_left(1 / asked, self._scores.attention_share, chosen)
            inside = np.flatnonzero(ratios <= ratio * (1 + 1e-9))
            if len(inside):
                heads = float(errors[inside[0]])
                predicted = chosen.error if chosen else 0.0
                total = correction.heads * heads + correction.forwards * predicted
                found.append(Expected(chosen, asked, heads, total))
        if not found:
            means = (
                "step caches and sparse attention together make" if len(self._fronts) > 1 else "sparse attention makes"
            )
            raise OutOfReach(
                f"a speed-up of {speedup:g} is out of reach: {means} a generation here {self.fastest(slow):.2f} times as fast "
                "at most; ask for less"
            )

        def rank(each: Expected) -> tuple[bool, float]:
            predicted = each.steps is not None and not each.steps.measured
            return measured_first and predicted, each.error

        return sorted(found, key=rank)

    def fastest(self, slow: Callable[[StepChoice | None], float] = lambda steps: 1.0) -> float:
        """The largest speed-up that there is."""
        share = self._scores.attention_share
        return max(
            self._steps.speedup(share, float(ratios[-1]), chosen) / slow(chosen) for chosen, ratios, _ in self._fronts
        )

    def best(self, ranked: Sequence[Expected]) -> Assignment:
        """Of some of what `ranked` gives, in its order, the one with the least error; its bound is that of all of these."""
        if not self._exact:
            near = self.assignment(ranked[0])
            return replace(near, bound=min(near.total(), *map(self._least, ranked)))
        found: Assignment | None = None
        bound = math.inf
        for expected in sorted(ranked, key=self._least):
            if found is not None and self._least(expected) >= found.total():
                break
            other = self.assignment(expected)
            assert other.bound is not None  # of a knapsack
            found, bound = min(found or other, other, key=Assignment.total), min(bound, other.bound)
        assert found is not None  # one was ranked
        return replace(found, bound=min(bound, found.total()))

    def _least(self, expected: Expected) -> float:
        """What no choice of heads falls below with these steps, the steps' error included, by the relaxation."""
        ratios, errors = next((x, y) for chosen, x, y in self._fronts if chosen is expected.steps)
        limit = self._steps.attention_left(1 / expected.speedup, self._scores.attention_share, expected.steps)
        heads = float(np.interp(limit, ratios[::-1], errors[::-1]))
        return heads + (expected.steps.error if expected.steps else 0.0)

    def assignment(self, expected: Expected) -> Assignment:
        """The choice of heads for one of `ranked`; its bound is that of these steps."""
        left = self._covered(expected.steps)
        ratio = self._steps.attention_left(1 / expected.speedup, self._scores.attention_share, expected.steps)
        limit = ratio * dense_time(self._tables)
        choice, bound = least_error(left, {name: table.time for name, table in left.items()}, limit, self._exact)
        return summary(self._scores, self._tables, left, choice, self._steps, expected.steps, bound)

    def _covered(self, chosen: StepChoice | None) -> Tables:
        """The tables where only the chosen steps run."""
        if chosen is None:
            return self._tables
        spans, transformers = self._scores.spans, self._steps.transformers
        return {
            name: table.under(Coverage.of(spans, transformers, name, chosen.computed), self._weights[name])
            for name, table in self._tables.items()
        }

    def _front(self, tables: Tables) -> tuple[Array, Array]:
        """Attention's time / that of dense attention in all steps, descending, and the heads' error."""
        options = len(self._scores.candidates)
        error = np.concatenate([table.error.reshape(-1, options) for table in tables.values()])
        time = np.concatenate([table.time.reshape(-1, options) for table in tables.values()])
        total, wrong = front(error, time)
        return total / dense_time(self._tables), wrong
