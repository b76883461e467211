"""What a rule that decides while it runs would do in a recorded generation, and at which thresholds it does something else."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from diffusers_accel.forwards import Computed, Decision, Now, Predictor, Rule
from diffusers_accel.search.steps.course import Course, Follower
from diffusers_accel.search.steps.samples import coefficients, denoised, whole
from diffusers_accel.search.steps.step_map import fit_steps
from diffusers_accel.search.steps.trajectory import Trajectory

FIELD = "threshold"  # of a rule: it predicts while an error is below it
MOST = 100.0  # of thresholds that are looked at
PRECISION = 1e-4  # relative, of a threshold at which something changes
LEAST = 1e-6  # a threshold below it counts as 0


@dataclass(frozen=True)
class ThresholdRange:
    """Thresholds at which a rule does the same in a recorded generation.

    Args:
        low, high: the range; between one and the next lies a gap of `PRECISION`, in which the change is. Both are None for a rule
            without a threshold.
        computed: the steps that compute there.
    """

    low: float | None
    high: float | None
    computed: tuple[int, ...]


def replay(rule: Rule, predictor: Predictor, trajectory: Trajectory) -> tuple[int, ...]:
    """The steps that a patched pipeline would compute, all branches following one decision: the rule's own `decide`, on latents
    as far as they are known without the model (`course`).

    Raises:
        ValueError: the rule does not fit the number of steps.
    """
    return _Replay(rule, predictor, trajectory).computed()


def threshold_ranges(rule: Rule, predictor: Predictor, trajectory: Trajectory) -> tuple[ThresholdRange, ...]:
    """All ranges of a rule's threshold from 0 to `MOST`, ascending: where one ends, another step is computed or predicted.

    At one step of one run a rule must compute below some threshold and predict above it, and what it carries on must not depend
    on the threshold. A rule without a threshold has one range.
    """
    if not has_threshold(rule):
        return (ThresholdRange(None, None, replay(rule, predictor, trajectory)),)
    return tuple(_Replay(rule, predictor, trajectory).ranges())


def has_threshold(rule: Any) -> bool:
    """Whether a rule is one that predicts while some error is below a threshold."""
    return any(each.name == FIELD for each in fields(rule))


def with_threshold(rule: Any, threshold: float) -> Rule:
    """The same rule with another threshold."""
    changed: Rule = replace(rule, **{FIELD: threshold})
    return changed


@dataclass(frozen=True, eq=False)
class _Point:
    """A run before a step, and the decisions that have led there."""

    course: Course
    carry: Any = None
    computed: tuple[int, ...] = ()


class _Replay:
    def __init__(self, rule: Rule, predictor: Predictor, trajectory: Trajectory) -> None:
        self._rule = rule
        self._follower = Follower(
            whole(trajectory),
            fit_steps(coefficients(trajectory)),
            predictor,
            max(rule.looks_back, predictor.looks_back),
            trajectory.fresh,
            denoised(trajectory),
        )
        self._steps = len(trajectory.steps)
        rule.check(self._steps)

    def computed(self) -> tuple[int, ...]:
        point = _Point(Course(0))
        while point.course.step < self._steps:
            point = self._next(point, self._unasked(point) or self._decide(self._rule, point))
        return point.computed

    def ranges(self) -> Iterator[ThresholdRange]:
        return self._ranges(_Point(Course(0)), 0.0, MOST)

    def _ranges(self, point: _Point, low: float, high: float) -> Iterator[ThresholdRange]:
        """Of a point to which all thresholds of a range lead."""
        while point.course.step < self._steps:
            decision = self._unasked(point)
            if decision is None:
                decision = self._at(low, point)
                if self._at(high, point).compute != decision.compute:
                    below, above = self._change(point, low, high)
                    yield from self._ranges(point, low, below)
                    yield from self._ranges(point, above, high)
                    return
            point = self._next(point, decision)
        yield ThresholdRange(low, high, point.computed)

    def _change(self, point: _Point, low: float, high: float) -> tuple[float, float]:
        """Two thresholds close to each other, between which the decision changes."""
        compute = self._at(low, point).compute
        while high - low > max(PRECISION * high, LEAST):
            middle = (low + high) / 2
            low, high = (middle, high) if self._at(middle, point).compute == compute else (low, middle)
        return low, high

    def _at(self, threshold: float, point: _Point) -> Decision:
        return self._decide(with_threshold(self._rule, threshold), point)

    def _unasked(self, point: _Point) -> Decision | None:
        """The decision of steps at which no rule is asked, as in `forwards.scope`."""
        step, samples = point.course.step, self._follower.samples
        if step in self._follower.fresh or step == self._steps - 1:
            return Decision(True)
        branch = next(iter(samples.v[step]))[0]
        unknown = any(part not in point.course.known for part in samples.v[step] if part[0] == branch)
        return Decision(True) if unknown else None

    def _decide(self, rule: Rule, point: _Point) -> Decision:
        """The rule is shown the first branch of the step, whose batch is put together again."""
        course, samples = point.course, self._follower.samples
        branch = next(iter(samples.v[course.step]))[0]
        members = [part for part in samples.v[course.step] if part[0] == branch]
        x, before = (_repeated(self._follower.x(course, lag), len(members)) for lag in (0, 1))
        computed = tuple(
            Computed(
                some[0].step, some[0].timestep, _repeated(some[0].x, len(some)), torch.cat([each.v for each in some])
            )
            for some in zip(*(course.known[part] for part in members), strict=True)
        )
        timestep = samples.timesteps[course.step]
        now = Now(course.step, self._steps, course.step, branch, timestep, x, before, computed)
        return rule.decide(now, point.carry)

    def _next(self, point: _Point, decision: Decision) -> _Point:
        step = point.course.step
        if decision.compute:
            return _Point(self._follower.compute(point.course), decision.carry, (*point.computed, step))
        return _Point(self._follower.predict(point.course), decision.carry, point.computed)


def _repeated(x: Tensor, count: int) -> Tensor:
    return x.repeat(count, *[1] * (x.dim() - 1))
