"""What the measured errors say about a choice as a whole, and when that is reason for a warning."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from diffusers_accel.search.assignment import Assignment
from diffusers_accel.search.scores import Array, Scores

# Relative squared errors from which on a result is called ruined: half of the amplitude of the final latents, and, where the
# spans were not measured, half of the energy of what attention gives.
RUINED_LATENTS = 0.25
RUINED_LAYERS = 0.5
NO_GAIN = 0.99  # an expected speed-up below it is a loss, not the noise of timing


def layer_errors(scores: Scores, choice: Mapping[str, Array]) -> dict[str, Array]:
    """Per transformer [spans, layers]: what the probe predicts for a choice, int [spans, layers, heads]: its errors, summed over
    calls and heads."""
    found = {}
    for name, chosen in choice.items():
        error = np.nan_to_num(np.take_along_axis(scores.error(name), chosen[..., None], -1)[..., 0])
        found[name] = error.sum(2) * scores.calls(name)[:, None]
    return found


def heads_error(scores: Scores, choice: Mapping[str, Array]) -> float | None:
    """The relative squared error of the final latents by a choice of heads alone: each (span, layer)'s impact, as measured at
    `sensitivity.DENSITY`, times its summed error. None where these were not measured."""
    if len(scores.impacts) < len(scores.spans):
        return None
    errors = layer_errors(scores, choice)
    return float(sum((scores.measured_impacts(name) * error).sum() for name, error in errors.items()))


def latents_error(scores: Scores, assignment: Assignment) -> float | None:
    """The same by an assignment, the error of the predicted steps included."""
    return assignment.total() if assignment.steps else heads_error(scores, assignment.choice)


def warnings(scores: Scores, assignment: Assignment) -> list[str]:
    """What anybody should know who means to use the plan: that it is slower than dense, that it ruins the result."""
    found = []
    if assignment.speedup < NO_GAIN:
        found.append(
            f"slower than dense: expected {assignment.speedup:.2f}x, as attention takes {assignment.attention_ratio:.0%} of "
            "dense attention's time. At this size, on this device, sparse attention does not pay: ask for a speed-up "
            "(Budget.speedup) instead, or search on another device or at a larger size"
        )
    if ruin := _ruin(scores, assignment):
        found.append(
            f"ruined result: {ruin}. Allow a higher density or less of a speed-up, or look at clips before use"
        )
    return found


def _ruin(scores: Scores, assignment: Assignment) -> str | None:
    if assignment.density == 0:
        return "no head attends to anything, at any step"
    latents = latents_error(scores, assignment)
    if latents is not None and latents >= RUINED_LATENTS:
        return (
            f"the final latents are expected to have a relative squared error of {latents:.2g}, where {RUINED_LATENTS:g} "
            "is half of their amplitude"
        )
    if latents is None and assignment.error >= RUINED_LAYERS:
        share = f"{assignment.error:.0%} of its energy"
        return f"attention's output is expected to be wrong by {share}, on average over calls and layers"
    return None
