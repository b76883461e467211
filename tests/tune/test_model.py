"""What clips show of the predictions: factors of the errors, of the times, and how a metric's loss follows the error."""

from __future__ import annotations

import math

import numpy as np
import pytest

from diffusers_accel.forwards import Forwards, Last, Schedule
from diffusers_accel.search.assignment import Assignment, Correction
from diffusers_accel.search.steps.choice import StepChoice
from diffusers_accel.tune.goal import Goal
from diffusers_accel.tune.model import Attempt, Model


def assignment(heads: float, steps: float | None, computed: int = 5, speedup: float = 2.0) -> Assignment:
    chosen = None
    if steps is not None:
        chosen = StepChoice(
            Forwards(Schedule(steps=tuple(range(computed))), Last("velocity")), tuple(range(computed)), steps
        )
    return Assignment({}, 0.1, 0.5, 0.5, speedup, chosen, heads)


def steps(computed: int) -> StepChoice | None:
    return assignment(0.0, 0.1, computed).steps


def tried(heads: float, steps: float | None, mse: float, computed: int = 5, speedup: float = 2.0) -> Attempt:
    psnr = -10 * math.log10(mse)
    return Attempt(assignment(heads, steps, computed), speedup, psnr, psnr)


def test_two_factors_are_told_apart() -> None:
    seen = [(0.02, None), (0.0, 0.01), (0.01, 0.004)]
    history = [tried(heads, steps, 3 * heads + 0.5 * (steps or 0.0)) for heads, steps in seen]
    model = Model.of(history, Goal.psnr(30))
    assert model.correction.heads == pytest.approx(3, rel=0.05)
    assert model.correction.forwards == pytest.approx(0.5, rel=0.2)
    for each in history:
        assert model.loss(each.assignment.total(model.correction)) == pytest.approx(10 ** (-each.psnr / 10), rel=0.15)


def test_one_clip_corrects_both_alike() -> None:
    model = Model.of([tried(0.02, None, 0.002)], Goal.psnr(30))
    assert model.correction.heads == pytest.approx(0.1, rel=0.05)
    assert model.correction.forwards == pytest.approx(0.1, rel=0.05)


def test_plans_without_an_error_correct_nothing() -> None:
    assert Model.of([tried(0.0, None, 1e-10)], Goal.psnr(30)).correction == Correction()


def test_times_are_corrected_by_the_number_of_steps() -> None:
    model = Model.of(
        [
            tried(0.01, None, 1e-3, speedup=1.0),
            tried(0.0, 0.01, 1e-3, speedup=2.5),
            tried(0.1, 0.01, 1e-3, 4, speedup=1.6),
        ],
        Goal.speedup(2),
    )
    assert model.factor(None) == pytest.approx(2.0) and model.factor(steps(5)) == pytest.approx(0.8)
    assert model.factor(steps(4)) == model.usual == pytest.approx(1.25)
    assert model.factor(steps(9)) == model.usual


def test_times_of_one_number_of_steps_are_averaged() -> None:
    """On a shared machine the same plan was seen to take 1.7 times as long a minute later."""
    seen = [tried(0.01, 0.01, 1e-3, speedup=speedup) for speedup in (1.0, 2.0, 4.0)]
    assert Model.of(seen, Goal.speedup(2)).factor(steps(5)) == pytest.approx(1.0)


def test_a_loss_that_grows_as_a_power_is_found() -> None:
    errors = np.array([1e-4, 1e-3, 1e-2])
    history = [
        Attempt(assignment(error, None), 2.0, -10 * math.log10(error), float(0.9 * error**0.5)) for error in errors
    ]
    model = Model.of(history, Goal.lpips(0.1))
    assert model.power == pytest.approx(0.5, rel=0.02)
    assert model.loss(model.correction.heads * 1e-3) == pytest.approx(0.9 * 1e-3**0.5, rel=0.05)


@pytest.mark.parametrize(
    ("kind", "value"),
    [("speedup", 1.0), ("speedup", float("nan")), ("psnr", 0), ("ssim", 1.0), ("lpips", -0.1), ("ms_per_step", 0)],
)
def test_goals_that_nothing_reaches_or_anything_does_are_refused(kind: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"Goal.{kind}: expected a number above"):
        Goal(kind, value)  # type: ignore[arg-type]


def test_goals_say_what_they_are() -> None:
    assert [
        str(each) for each in (Goal.speedup(2), Goal.psnr(35), Goal.lpips(0.1), Goal.ssim(0.95), Goal.ms_per_step(80))
    ] == [
        "2x",
        "PSNR 35 dB",
        "LPIPS 0.1",
        "SSIM 0.95",
        "80 ms a step",
    ]
    with pytest.raises(ValueError, match="expected one of speedup, ms_per_step, psnr"):
        Goal("fast", 2)  # type: ignore[arg-type]
