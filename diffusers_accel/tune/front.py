"""The front of a search: what is expected at every speed-up, of step caches and heads together and of each alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from diffusers_accel.files import quoted
from diffusers_accel.search.assignment import Assignment
from diffusers_accel.search.checks import real_number
from diffusers_accel.search.joint import Joint
from diffusers_accel.search.profile import Profile

BOTH, HEADS, STEPS = "step caches and heads", "heads only", "step caches only"
ROUND = (1.1, 1.2, 1.35, 1.5, 1.75, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0)  # speed-ups that people ask for
MOST = 6  # of them, unless others are named
POINTS = 32  # of a curve
SLOWEST = 1.02  # that is drawn: at 1 nothing is left out, and the error is 0


@dataclass(frozen=True)
class Front:
    """Predictions of one search; nothing of it was measured on clips.

    Args:
        curves: by what is chosen from, `BOTH`, `HEADS` or `STEPS`: speed-ups, ascending, and the least expected error at each of
            them: the relative squared error of the final latents. A curve ends where it reaches no further.
        plans: what is assigned at a few speed-ups.
        dense_steps: of the search.
    """

    curves: dict[str, tuple[tuple[float, float], ...]]
    plans: dict[float, Assignment]
    dense_steps: float = 0.0


def find_front(profile: Profile, speedups: Sequence[float] | None = None, dense_steps: float = 0.0) -> Front:
    """The front of what a search measured. Seconds; the pipeline is not needed.

    Args:
        profile: with measured spans, as a search for a goal, a speed-up or a density has them.
        speedups: for which plans are wanted; None: six at most, over what can be reached; none where 1.1 cannot be.
        dense_steps: what stays dense and is computed at the start of the schedule, a share of it.

    Raises:
        OutOfReach: a speed-up that was named cannot be reached.
        ValueError: spans were not measured, or a speed-up is no number above 1.
    """
    profile = _of_one_search(profile)
    if len(profile.scores.impacts) < len(profile.scores.spans):
        raise ValueError(
            "profile: expected scores whose spans were measured, which say what an error does to the result; search for a "
            "speed-up or a density, without span_weights"
        )
    joint = profile.joint(dense_steps)
    reach = joint.fastest()
    asked = _spread([each for each in ROUND if each <= reach]) if speedups is None else _checked(speedups)
    return Front(
        _curves(profile, joint, dense_steps), {each: joint.best(joint.ranked(each)) for each in asked}, dense_steps
    )


def _of_one_search(profile: Profile) -> Profile:
    """Without step caches that another search has left beside the scores."""
    strange = profile.steps is not None and profile.steps.config != profile.scores.config
    return replace(profile, steps=None) if strange else profile


def _curves(profile: Profile, joint: Joint, dense_steps: float) -> dict[str, tuple[tuple[float, float], ...]]:
    scores, cost = profile.scores, profile.cost
    joints = {BOTH: joint, HEADS: Joint(scores, cost, None, dense_steps)}
    if profile.steps is None:
        del joints[BOTH]
    else:
        joints[STEPS] = Joint(
            scores, cost, profile.steps, dense_steps, among=()
        )  # heads have nothing but dense attention
    return {name: tuple(_curve(each)) for name, each in joints.items()}


def _curve(joint: Joint) -> Iterator[tuple[float, float]]:
    reach = joint.fastest()
    if reach < SLOWEST:
        return
    for speedup in np.geomspace(SLOWEST, reach, POINTS):
        speedup = min(float(speedup), reach * (1 - 1e-9))  # what is just reached may miss itself by rounding
        yield speedup, joint.ranked(speedup)[0].error


def _spread(speedups: Sequence[float]) -> list[float]:
    """`MOST` of them at most, the first and the last among them."""
    if not speedups:
        return []
    places = np.unique(np.linspace(0, len(speedups) - 1, MOST).round().astype(int))
    return [speedups[place] for place in places]


def _checked(speedups: Sequence[float]) -> list[float]:
    found = sorted({real_number("speedups", each) for each in speedups})
    if not found or not (found[0] > 1 and np.isfinite(found[-1])):
        raise ValueError(f"speedups: expected factors above 1, such as [1.5, 2], found {quoted(list(speedups))}")
    return found
