"""The choices for every number of computed steps."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import pytest
from torch import Tensor

from diffusers_accel.forwards import EasyCache, Forwards, Last, Schedule, Taylor
from diffusers_accel.search.steps import StepChoice, step_choices
from diffusers_accel.search.steps.curve import DEFAULT, Curve, evenly, short_number
from diffusers_accel.search.steps.trajectory import Trajectory
from tests.search.steps.synthetic import SIGMAS, drawn, euler

STEPS = len(SIGMAS) - 1


def lively(seed: int = 0) -> Trajectory:
    """Outputs that move fast in the middle of the schedule."""

    def outputs(step: int) -> dict[str, Tensor]:
        return {"": drawn(seed + 1) + (3 if step > 3 else 0.1 * step) * drawn(seed + 2)}

    return euler(outputs, {"": 1.0}, prompt=f"prompt {seed}")


def test_there_is_one_choice_for_each_number_of_steps() -> None:
    found = step_choices([lively()])
    assert [len(choice.computed) for choice in found] == list(range(2, STEPS + 1))
    for choice in found:
        assert {0, STEPS - 1} <= set(choice.computed) and list(choice.computed) == sorted(choice.computed)
        assert choice.forwards.rule == Schedule(steps=choice.computed) and choice.forwards.predictor in DEFAULT
        assert Forwards.from_json(choice.forwards.to_json()) == choice.forwards
    assert found[-1].error == 0
    assert found[0].error > 0.01


def test_several_ways_differ_and_the_best_comes_first() -> None:
    curve, one = Curve([lively()]), step_choices([lively()])
    several = step_choices([lively()], ways=4)
    for count in range(3, STEPS - 1):
        some = [each for each in several if len(each.computed) == count]
        assert 1 < len(some) <= 4 and len({each.forwards for each in some}) == len(some)
        assert [each.error for each in some] == sorted(each.error for each in some)
        assert some[0] == next(each for each in one if len(each.computed) == count)
        even = min((curve.error(each, evenly(STEPS, count)), each.label) for each in DEFAULT)
        assert even in [(each.error, each.forwards.predictor.label) for each in some]
    assert set(step_choices([lively()], ways=2)) < set(several)


def test_evenly_spaced_steps_begin_and_end_the_schedule() -> None:
    assert [evenly(10, count) for count in (2, 4, 10)] == [(0, 9), (0, 3, 6, 9), tuple(range(10))]


def test_the_step_is_computed_at_which_the_output_jumps() -> None:
    (choice,) = (each for each in step_choices([lively()], [Last("velocity")]) if len(each.computed) == 3)
    assert choice.computed == (0, 4, 6)


def test_the_best_predictor_is_taken() -> None:
    def outputs(step: int) -> dict[str, Tensor]:
        return {"": drawn(1) + SIGMAS[step] * drawn(2)}

    found = step_choices([euler(outputs, {"": 1.0})])
    three = next(each for each in found if len(each.computed) == 3)
    assert three.forwards.predictor == Taylor(1) and three.computed == (0, 1, 6)
    assert three.error < 1e-8


def test_no_other_schedule_of_one_run_is_better() -> None:
    """With two runs or more their errors may cancel, which the path does not look for; with one there is nothing to cancel."""
    curve = Curve([lively(), lively(10)])
    for predictor in DEFAULT:
        for choice in curve.schedules(predictor):
            if len(choice.computed) == STEPS - 1:  # one step is predicted
                others = combinations(range(1, STEPS - 1), STEPS - 3)
                best = min(curve.error(predictor, (0, *inner, STEPS - 1)) for inner in others)
                assert choice.error == pytest.approx(best)


def test_errors_are_means_over_prompts() -> None:
    one, other = lively(), lively(10)
    steps, predictor = (0, 3, 6), Last("velocity")
    first, second, both, swapped, twice = (
        Curve(some).error(predictor, steps) for some in ([one], [other], [one, other], [other, one], [one, one])
    )
    assert both == pytest.approx(swapped) and twice == pytest.approx(first)
    assert first != pytest.approx(second, rel=0.1)
    # Powers of the latents are shared, so that it is not exactly the mean of what each says alone.
    assert both == pytest.approx((first + second) / 2, rel=0.1)


def test_rules_come_out_in_the_same_type() -> None:
    trajectories = [lively(), lively(10)]
    curve = Curve(trajectories)
    found = curve.of_rule(EasyCache(warm_up=2), Last("residual"))
    assert found and all(isinstance(each, StepChoice) and isinstance(each.forwards.rule, EasyCache) for each in found)
    thresholds = [each.forwards.rule.threshold for each in found if isinstance(each.forwards.rule, EasyCache)]
    assert thresholds == sorted(set(thresholds))
    counts = [len(each.computed) for each in found]
    assert counts[0] == STEPS and found[0].error == 0, "a low threshold predicts nothing"
    assert counts[-1] == 3, "a high one all that may be"
    alone = step_choices(trajectories)
    joined = {len(each.computed): each for each in step_choices(trajectories, rules=[EasyCache(warm_up=2)])}
    for choice in alone:
        of_rules = [
            each.error
            for p in DEFAULT
            for each in curve.of_rule(EasyCache(warm_up=2), p)
            if len(each.computed) == len(choice.computed)
        ]
        assert joined[len(choice.computed)].error == min([choice.error, *of_rules])


def test_two_experts() -> None:
    names = ["transformer"] * 3 + ["transformer_2"] * 4
    one = euler(lambda step: {"": drawn(1) + step * drawn(2)}, {"": 1.0}, transformers=names)
    found = step_choices([one])
    assert [len(choice.computed) for choice in found] == list(range(3, STEPS + 1))
    assert all({0, 3, 6} <= set(choice.computed) for choice in found)


def test_trajectories_of_two_searches_are_refused() -> None:
    one = lively()
    short = replace(one, steps=one.steps[:-1])
    with pytest.raises(
        ValueError, match=r"trajectories\[1\]: expected those of one model and call, with the steps of the first, 7"
    ):
        step_choices([one, short])
    with pytest.raises(ValueError, match="identity of the first"):
        step_choices([one, replace(one, identity={"model": "another"})])
    with pytest.raises(ValueError, match="found none"):
        step_choices([])


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0.0, 0.1, 0.05), (0.1521, 0.1874, 0.2), (0.02, 100.0, 0.03), (0.12341, 0.12349, 0.12345)],
)
def test_a_threshold_is_a_short_number(low: float, high: float, expected: float) -> None:
    found = short_number(low, high)
    assert low < found < high
    assert found == expected or expected >= high
