"""Which plans to try next."""

from __future__ import annotations

import math
from collections.abc import Sequence

from diffusers_accel.search.assign import Assignment
from diffusers_accel.search.budget import Budget
from diffusers_accel.search.profile import Profile
from diffusers_accel.search.reach import OutOfReach
from diffusers_accel.tune.model import Model, computed

HALVINGS = 12  # of the interval in which a speed-up is looked for: to less than 0.1 % of it
FASTEST = 32.0


def proposals(profile: Profile, speedup: float, model: Model | None, dense_steps: float) -> list[Assignment]:
    """The best plan for each number of computed steps that should really reach the speed-up, the one with the least expected
    error first.

    Raises:
        OutOfReach: there is none.
    """
    if model is None:
        return _one_each(profile.assignments(Budget.speedup(speedup), dense_steps=dense_steps), None)
    found: list[Assignment] = []
    reason: OutOfReach | None = None
    for factor in {model.usual, *model.slow.values()}:
        try:
            every = profile.assignments(Budget.speedup(max(1.0, speedup * factor)), dense_steps=dense_steps)
        except OutOfReach as error:
            reason = error
            continue
        found += [each for each in every if model.factor(computed(each)) == factor]
    if not found:
        raise reason or OutOfReach(f"a speed-up of {speedup:g} is out of reach")
    return _one_each(found, model)


def fastest_within(profile: Profile, loss: float, model: Model, dense_steps: float) -> float:
    """The largest speed-up at which a plan should have at most this loss of the goal's metric; 1 where there is none."""
    low, high = 0.0, math.log(FASTEST)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        try:
            best = proposals(profile, math.exp(middle), model, dense_steps)[0]
        except OutOfReach:
            high = middle
        else:
            low, high = (middle, high) if model.loss(best) <= loss else (low, middle)
    return math.exp(low)


def first_of(ranked: Sequence[Assignment], most: int) -> list[Assignment]:
    """Plans that tell most of both scopes: the best, that of all steps, and the one whose heads are closest to dense."""
    heads_only = [each for each in ranked if each.steps is None]
    cached = sorted((each for each in ranked if each.steps), key=lambda each: (each.heads_error, each.total()))
    found: dict[int | None, Assignment] = {}
    for each in (*ranked[:1], *heads_only, *cached[:1], *ranked):
        found.setdefault(computed(each), each)
    return list(found.values())[:most]


def _one_each(found: Sequence[Assignment], model: Model | None) -> list[Assignment]:
    """The best of each number of computed steps, the best of all first."""

    def error(assignment: Assignment) -> float:
        return assignment.total(model.correction) if model else assignment.total()

    best: dict[int | None, Assignment] = {}
    for each in sorted(found, key=error):
        best.setdefault(computed(each), each)
    return list(best.values())
