"""The step caches that users call by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from diffusers_accel.files import quoted
from diffusers_accel.forwards.forwards import Forwards
from diffusers_accel.forwards.predictor import Predictor
from diffusers_accel.forwards.predictors import Last, Taylor
from diffusers_accel.forwards.rules import EasyCache, Schedule

NAMED_PREDICTORS: dict[str, Predictor] = {
    "residual": Last("residual"),
    "velocity": Last("velocity"),
    "linear": Taylor(1),
    "taylor": Taylor(2),
}


def easycache(
    threshold: float = 0.025,
    warm_up: int = 10,
    predictor: str = "residual",
    branches: Sequence[str] | None = None,
) -> Forwards:
    """EasyCache (arXiv 2507.02860): runs the model again once its output is expected to have changed by `threshold`.

    The authors take threshold=0.05 with warm_up=10 for Wan 2.1 and 0.025 with 5 for HunyuanVideo; the defaults are the more
    careful of each. They decide on the conditional branch, which is the first of a step in diffusers too.

    Args:
        threshold: relative change of the output, added up over predicted steps; 0 computes every step.
        warm_up: number of first steps that compute; a call of fewer than warm_up + 2 steps predicts nothing, and says so.
        predictor: "residual" (the paper's), "velocity", "linear" or "taylor" (of order 2); others as Forwards(rule, predictor).
        branches: those that may be predicted; None: all.
    """
    return Forwards(EasyCache(threshold, warm_up), _predictor(predictor), _names(branches))


def schedule(
    steps: Sequence[int] | None = None,
    shares: Sequence[float] | None = None,
    predictor: str = "residual",
    branches: Sequence[str] | None = None,
) -> Forwards:
    """Computes these steps and predicts the others; the first and the last step compute in any case.

    Args:
        steps: indices from 0, for one number of steps.
        shares: shares of the schedule in [0, 1), for any number of steps. Give one of the two.
        predictor: "residual", "velocity", "linear" or "taylor", as of `easycache`.
        branches: those that may be predicted; None: all.
    """
    rule = Schedule(None if steps is None else tuple(steps), None if shares is None else tuple(shares))
    return Forwards(rule, _predictor(predictor), _names(branches))


def _predictor(name: str) -> Predictor:
    if name not in NAMED_PREDICTORS:
        raise ValueError(f"predictor: expected one of {', '.join(NAMED_PREDICTORS)}, found {quoted(name)}")
    return NAMED_PREDICTORS[name]


def _names(branches: Any) -> Any:  # what is no list of names is refused by Forwards
    return branches if branches is None or isinstance(branches, str) else tuple(branches)


NAMED_FORWARDS: dict[str, Callable[..., Forwards]] = {"easycache": easycache, "schedule": schedule}
