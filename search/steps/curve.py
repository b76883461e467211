"""For every number of computed steps the best ways to leave the others out."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
import torch

from diffusers_accel.files import quoted
from diffusers_accel.forwards import Forwards, Last, Predictor, Rule, Schedule, Taylor
from diffusers_accel.search.steps.choice import StepChoice
from diffusers_accel.search.steps.course import Follower
from diffusers_accel.search.steps.lift import Lift, lifts_of
from diffusers_accel.search.steps.replay import ThresholdRange, threshold_ranges, with_threshold
from diffusers_accel.search.steps.run_errors import path_error, run_errors
from diffusers_accel.search.steps.samples import Samples, check_linear, coefficients
from diffusers_accel.search.steps.shortest_path import best_paths
from diffusers_accel.search.steps.state_graph import state_graph
from diffusers_accel.search.steps.step_map import StepFit, fit_steps
from diffusers_accel.search.steps.trajectory import Trajectory

DEFAULT: tuple[Predictor, ...] = (Last("velocity"), Last("residual"), Taylor(1))


def step_choices(
    trajectories: Sequence[Trajectory],
    predictors: Sequence[Predictor] = DEFAULT,
    rules: Sequence[Rule] = (),
    ways: int = 1,
) -> tuple[StepChoice, ...]:
    """The choices of least predicted error for every number of computed steps that there is one for, fewest first.

    Args:
        trajectories: recorded prompts of one model and call; errors are means over them.
        predictors: each is tried for every schedule.
        rules: that decide while they run, tried with each predictor at every threshold that makes a difference.
        ways: how many choices for a number of computed steps, for who can measure which one is best: of those of each
            predictor, of the evenly spaced one and of that of each rule so many, least error first.

    Raises:
        ValueError: the trajectories are not of one schedule, or a predictor or rule does not fit it.
    """
    curve = Curve(trajectories)
    groups = [curve.schedules(predictor) for predictor in predictors]
    groups.append(tuple(each for predictor in predictors for each in curve.evenly_spaced(predictor)))
    groups += [tuple(each for predictor in predictors for each in curve.of_rule(rule, predictor)) for rule in rules]
    found: dict[int, dict[Forwards, StepChoice]] = {}
    for group in groups:
        for count, choice in _best_of_each_number(group).items():
            found.setdefault(count, {}).setdefault(choice.forwards, choice)
    ranked = (sorted(found[count].values(), key=lambda each: each.error)[:ways] for count in sorted(found))
    return tuple(each for some in ranked for each in some)


class Curve:
    """Predicted errors on recorded prompts, of whatever schedule is asked for.

    Raises:
        ValueError: the trajectories are not of one schedule.
    """

    def __init__(self, trajectories: Sequence[Trajectory]) -> None:
        check_alike(trajectories)
        self.trajectories = tuple(trajectories)
        self.steps = len(self.trajectories[0].steps)
        self.fresh = self.trajectories[0].fresh
        self._samples: list[Samples] = [coefficients(each) for each in self.trajectories]
        self._lifts: list[Lift] = lifts_of(self.trajectories, self._samples)
        self.fits: list[tuple[StepFit, ...]] = [fit_steps(each) for each in self._samples]

    def schedules(self, predictor: Predictor) -> tuple[StepChoice, ...]:
        """The best schedule for every number of computed steps, with one predictor."""
        graph = state_graph(self.steps, self.fresh, predictor)
        runs = enumerate(zip(self._followers(predictor), self._lifts))
        tables = [run_errors(one, lift, graph, number, len(self._lifts)) for number, (one, lift) in runs]
        together = {
            state: {end: torch.stack([table[state][end] for table in tables]).sum(0) for end in row}
            for state, row in tables[0].items()
        }
        return tuple(
            StepChoice(Forwards(Schedule(steps=computed), predictor), computed, self.error(predictor, computed))
            for computed in best_paths(graph, together).values()
        )

    def evenly_spaced(self, predictor: Predictor) -> tuple[StepChoice, ...]:
        """For every number of computed steps those at equal distances, with one predictor."""
        found: dict[int, StepChoice] = {}
        for count in range(1 + (self.steps > 1), self.steps + 1):
            computed = tuple(sorted({*evenly(self.steps, count), *self.fresh}))
            choice = StepChoice(
                Forwards(Schedule(steps=computed), predictor), computed, self.error(predictor, computed)
            )
            found.setdefault(len(computed), choice)
        return tuple(found.values())

    def error(self, predictor: Predictor, computed: Sequence[int]) -> float:
        """Predicted error of computing exactly these steps, mean over the prompts."""
        wanted = sorted({*computed, *self.fresh, self.steps - 1})
        return self._mean(predictor, [wanted] * len(self.trajectories))

    def of_rule(self, rule: Rule, predictor: Predictor) -> tuple[StepChoice, ...]:
        """A choice for every range of thresholds in which a rule does the same on all prompts, ascending."""
        ranges = [threshold_ranges(rule, predictor, each) for each in self.trajectories]
        return tuple(self._choice(rule, predictor, *each) for each in _common(ranges))

    def _choice(
        self, rule: Rule, predictor: Predictor, threshold: float | None, computed: Sequence[tuple[int, ...]]
    ) -> StepChoice:
        """Of one threshold: `computed` on each prompt."""
        chosen = rule if threshold is None else with_threshold(rule, threshold)
        return StepChoice(Forwards(chosen, predictor), max(computed, key=len), self._mean(predictor, computed))

    def _mean(self, predictor: Predictor, computed: Sequence[Sequence[int]]) -> float:
        """Over the prompts, each with its computed steps."""
        each = zip(self._followers(predictor), self._lifts, computed, strict=True)
        found = sum(path_error(*one) for one in each) / len(computed)
        if not math.isfinite(found):
            raise ValueError(
                f"expected finite errors, found {found}: the latents of the recorded prompts are too large"
            )
        return found

    def _followers(self, predictor: Predictor) -> list[Follower]:
        check_linear(predictor)
        return [
            Follower(samples, fits, predictor, predictor.looks_back, self.fresh)
            for samples, fits in zip(self._samples, self.fits, strict=True)
        ]


def evenly(steps: int, count: int) -> tuple[int, ...]:
    """So many steps of a schedule at equal distances, the first and the last among them."""
    return tuple(round(place) for place in np.linspace(0, steps - 1, count).tolist())


def _best_of_each_number(choices: Sequence[StepChoice]) -> dict[int, StepChoice]:
    """Number of computed steps -> the choice of least error."""
    best: dict[int, StepChoice] = {}
    for each in choices:
        count = len(each.computed)
        if count not in best or each.error < best[count].error:
            best[count] = each
    return best


def check_alike(trajectories: Sequence[Trajectory]) -> None:
    """Refuses trajectories of several schedules, models or sizes."""
    if not trajectories:
        raise ValueError("trajectories: expected one recorded prompt or more, found none")
    first = trajectories[0]
    for number, each in enumerate(trajectories[1:], 1):
        for what, mine, other in (
            ("steps", len(first.steps), len(each.steps)),
            ("transformers", first.transformers, each.transformers),
            ("latents of shape", list(first.steps[0].x.shape), list(each.steps[0].x.shape)),
            ("identity", first.identity, each.identity),
        ):
            if mine != other:
                raise ValueError(
                    f"trajectories[{number}]: expected those of one model and call, with the {what} of the first, "
                    f"{quoted(mine)}, found {quoted(other)}"
                )


def _common(ranges: Sequence[Sequence[ThresholdRange]]) -> Iterator[tuple[float | None, list[tuple[int, ...]]]]:
    """A threshold from every stretch in which nothing changes on any prompt, and what computes there on each."""
    if ranges[0][0].high is None:
        yield None, [each[0].computed for each in ranges]
        return
    edges = sorted({0.0, *(one.high for each in ranges for one in each if one.high is not None)})
    seen: list[list[tuple[int, ...]]] = []
    for low, high in pairwise(edges):
        threshold = short_number(low, high)
        computed = [
            next(one.computed for one in each if one.high is not None and threshold <= one.high) for each in ranges
        ]
        if computed not in seen[-1:]:
            seen.append(computed)
            yield threshold, computed


def short_number(low: float, high: float) -> float:
    """The number of fewest digits in a range, near its middle; near its lower end where it is wide."""
    middle = (low + min(high, 2 * low)) / 2 if low else high / 2
    for digits in range(1, 17):
        found = float(f"{middle:.{digits}g}")
        if low < found < high:
            return found
    return middle
