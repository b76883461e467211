"""Which plans to try next."""

from __future__ import annotations

import math
from collections.abc import Sequence

from diffusers_accel.search.joint import Expected, Joint
from diffusers_accel.tune.model import Model

HALVINGS = 24  # of the interval in which a speed-up is looked for


def proposals(joint: Joint, speedup: float, model: Model, measured_first: bool = False) -> list[Expected]:
    """The best plan for each number of computed steps that should really reach the speed-up, the one with the least expected
    error first.

    Args:
        measured_first: as of `Joint.ranked`.

    Raises:
        OutOfReach: there is none.
    """
    found: dict[int | None, Expected] = {}
    for each in joint.ranked(speedup, model.correction, model.factor, measured_first):
        found.setdefault(each.computed, each)
    return list(found.values())


def fastest_within(joint: Joint, loss: float, model: Model) -> float:
    """The largest speed-up at which a plan should have at most this loss of the goal's metric; 1 where there is none."""
    low, high = 0.0, math.log(max(1.0, joint.fastest(model.factor)))
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        expected = joint.ranked(math.exp(middle), model.correction, model.factor)[0].error
        low, high = (middle, high) if model.loss(expected) <= loss else (low, middle)
    return math.exp(low)


def first_of(ranked: Sequence[Expected], most: int) -> list[Expected]:
    """Plans that tell most of both scopes: the best, that of all steps, and the one whose heads are closest to dense."""
    heads_only = [each for each in ranked if each.steps is None]
    cached = sorted((each for each in ranked if each.steps), key=lambda each: (each.heads_error, each.error))
    found: dict[int | None, Expected] = {}
    for each in (*ranked[:1], *heads_only, *cached[:1], *ranked):
        found.setdefault(each.computed, each)
    return list(found.values())[:most]
