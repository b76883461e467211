"""One budget over two scopes: which steps run, and what the heads do in those that run."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from diffusers_accel.files import FileError
from diffusers_accel.forwards import Forwards, Last, Schedule
from diffusers_accel.search.assign import assign
from diffusers_accel.search.assignment import Assignment, Correction
from diffusers_accel.search.budget import Budget
from diffusers_accel.search.cost import Cost
from diffusers_accel.search.coverage import Coverage
from diffusers_accel.search.joint import Expected, Joint
from diffusers_accel.search.plan_making import make_plan
from diffusers_accel.search.profile import Profile
from diffusers_accel.search.reach import OutOfReach
from diffusers_accel.search.scores import Scores
from diffusers_accel.search.step_options import StepOptions
from diffusers_accel.search.steps.choice import StepChoice
from diffusers_accel.search.steps_alone import StepsAlone
from tests.search.test_assign import cost_of, costs, make_scores, random_scores
from tests.search.test_sensitivity import with_impacts

STEPS = 8
IMPACTS = (0.5, 0.25)


def choice(*computed: int, error: float = 0.01) -> StepChoice:
    return StepChoice(Forwards(Schedule(steps=computed), Last("velocity")), computed, error)


def options(*choices: StepChoice, share: float = 0.9) -> StepOptions:
    return StepOptions(choices, ("transformer",) * STEPS, share)


def small_scores(seed: int = 0) -> Scores:
    """Two spans of 2 and 6 steps, 2 layers of 2 heads, 3 candidates; attention takes 0.6 of a generation."""
    random = np.random.default_rng(seed)
    error = random.uniform(0.01, 0.2, (2, 2, 2, 3)) * np.array([0.0, 2.0, 1.0])
    return with_impacts(make_scores(error, densities=(1.0, 0.0, 0.5), share=0.6), *IMPACTS)


def test_steps_save_forwards_and_heads_what_is_left() -> None:
    steps = options(choice(0, 2, 4, 7), share=0.9)
    # 0.1 outside the forwards, 0.3 of them beside attention, halved, attention at a quarter of its time.
    assert steps.time(0.6, 0.25, steps.choices[0]) == pytest.approx(0.1 + 0.15 + 0.15)
    assert steps.speedup(0.6, 1.0, None) == pytest.approx(1.0)
    assert steps.attention_left(0.4, 0.6, steps.choices[0]) == pytest.approx(0.25)


HEADS = np.array([*itertools.product(range(3), repeat=8)]).reshape(
    -1, 2, 2, 2
)  # all choices, [spans, layers, heads] each
MS = np.array([100.0, 0.0, 50.0])


def best_of(
    scores: Scores, cost: Cost, speedup: float, steps: StepOptions, dense_steps: float = 0.0, exact: bool = False
) -> Assignment:
    joint = Joint(scores, cost, steps, dense_steps, exact=exact)
    return joint.best(joint.ranked(speedup))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("speedup", [1.2, 1.6, 2.0, 2.6])
def test_against_all_pairs_of_steps_and_heads(seed: int, speedup: float) -> None:
    scores, cost = small_scores(seed), costs(*MS)
    choices = [choice(0, 2, 4, 6, 7, error=0.004), choice(0, 3, 7, error=0.02), choice(0, 1, 2, 3, 5, 7, error=0.001)]
    steps = options(*choices)
    found = best_of(scores, cost, speedup, steps)
    best = _least_error(scores, steps, speedup)
    assert found.speedup >= speedup * (1 - 1e-9)
    # At most one head's choice away from the optimum, and the optimum of its own time.
    assert best - 1e-9 <= found.total() <= best + _largest(scores)
    assert found.total() <= 1.5 * best + 0.02


def _largest(scores: Scores) -> float:
    """The most that one head adds to the error."""
    return float(scores.error("transformer").max()) * STEPS * max(IMPACTS)


def _least_error(scores: Scores, steps: StepOptions, speedup: float) -> float:
    """Of all choices of steps and heads that keep the speed-up, worked out step by step."""
    error, best = scores.error("transformer"), np.inf
    picked = np.take_along_axis(np.broadcast_to(error, (len(HEADS), *error.shape)), HEADS[..., None], -1)[..., 0].sum(
        (2, 3)
    )
    ms = MS[HEADS].sum((2, 3))  # [choices, spans], of a step
    span = [int(step >= 2) for step in range(STEPS)]
    for chosen in (None, *steps.choices):
        computed = chosen.computed if chosen else tuple(range(STEPS))
        total, time = np.full(len(HEADS), chosen.error if chosen else 0.0), np.zeros(len(HEADS))
        for step in range(STEPS):
            source = span[max(each for each in computed if each <= step)]
            total += IMPACTS[span[step]] * picked[:, source]
            time += ms[:, span[step]] * (step in computed)
        left = 1 - steps.share + (steps.share - 0.6) * len(computed) / STEPS + 0.6 * time / (STEPS * 400)
        kept = total[left <= 1 / speedup * (1 + 1e-12)]
        best = min(best, kept.min(initial=np.inf))
    return float(best)


def test_the_error_of_a_computed_step_is_made_again_in_those_it_stands_for() -> None:
    scores, cost = small_scores(), costs(100, 0, 50)
    some = choice(0, 3, 7, error=0.0)  # step 0 stands for a step of the second span too
    joint = Joint(scores, cost, options(some))
    found = joint.assignment(next(each for each in joint.ranked(3) if each.steps))
    covered = Coverage.of(scores.spans, ("transformer",) * STEPS, "transformer", some.computed)
    picked = np.take_along_axis(scores.error("transformer"), found.choice["transformer"][..., None], -1)[..., 0]
    per_call = picked.sum((1, 2)) * scores.calls("transformer")
    assert found.heads_error == pytest.approx(float(((covered.covers @ np.array(IMPACTS)) * per_call).sum()))
    assert found.heads_error > 0


def test_where_steps_are_cheap_heads_stay_dense_and_the_other_way_round() -> None:
    scores, cost = small_scores(), costs(100, 0, 50)
    cheap, dear = options(choice(0, 3, 7, error=1e-6)), options(choice(0, 3, 7, error=1e6))
    cached = best_of(scores, cost, 1.5, cheap)
    assert cached.steps is not None and cached.heads_error == 0 and not cached.choice["transformer"].any()
    sparse = best_of(scores, cost, 1.5, dear)
    assert sparse.steps is None and sparse.heads_error > 0
    # What clips have shown of the two errors decides as well.
    both = Joint(scores, cost, options(choice(0, 3, 7, error=0.05)))
    assert both.ranked(1.5, Correction(heads=1e6))[0].steps is not None
    assert both.ranked(1.5, Correction(forwards=1e6))[0].steps is None


def test_both_together_reach_what_neither_does() -> None:
    scores, cost = small_scores(), costs(100, 0, 50)
    steps = options(choice(0, 2, 4, 6, 7))
    found = best_of(scores, cost, 3.0, steps)
    assert found.steps is not None and found.heads_error > 0 and found.speedup >= 3.0
    with pytest.raises(OutOfReach, match="step caches and sparse attention together make a generation here 3.48 times"):
        best_of(scores, cost, 4, steps)
    with pytest.raises(OutOfReach, match="2.50 is the most"):
        assign(scores, cost, Budget.speedup(3.0))


def test_dense_steps_are_computed() -> None:
    scores, cost = small_scores(), costs(100, 0, 50)
    late, early = choice(0, 1, 4, 7, error=0.02), choice(0, 3, 5, 7, error=0.001)
    steps = options(late, early)
    assert best_of(scores, cost, 1.5, steps).steps == early
    assert best_of(scores, cost, 1.5, steps, dense_steps=0.25).steps == late


def test_spans_have_to_be_measured() -> None:
    scores = random_scores()
    with pytest.raises(ValueError, match="expected scores whose spans were measured"):
        best_of(scores, cost_of(scores), 1.2, options(choice(0, 3, 7)))


def test_the_plan_has_the_step_cache_and_what_it_is_expected_to_cost() -> None:
    scores, cost = small_scores(), costs(100, 0, 50)
    found = best_of(scores, cost, 2.0, options(choice(0, 2, 5, 7, error=1e-4)))
    plan = make_plan(scores, cost, found, Budget.speedup(2.0))
    assert found.steps is not None and plan.forwards == found.steps.forwards
    assert plan.provenance["predicted"]["steps_error"] == 1e-4
    assert plan.provenance["predicted"]["latents_error"] == pytest.approx(found.total())


def test_options_come_back_from_their_file(tmp_path: Path) -> None:
    steps = replace(options(choice(0, 2, 7), choice(0, 1, 2, 7, error=0.5)), config={"seed": 3})
    steps.save(tmp_path / "a.steps.json")
    assert StepOptions.load(tmp_path / "a.steps.json") == steps
    text = (tmp_path / "a.steps.json").read_text()
    (tmp_path / "a.steps.json").write_text(text.replace("0.5", "0.4"))
    with pytest.raises(FileError, match="delete the file and search again"):
        StepOptions.load(tmp_path / "a.steps.json")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"choices": (choice(0, 3, 8),)}, r"choices\[0\].computed: expected steps of 0 to 7"),
        ({"choices": (choice(1, 3),)}, r"choices\[0\].computed: expected steps of 0 to 7, ascending from 0"),
        ({"choices": (choice(0, 3, error=-1.0),)}, r"choices\[0\].error: expected a number of 0 or more"),
        ({"share": 0.0}, "share: expected a share"),
    ],
)
def test_options_without_a_meaning_are_refused(wrong: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(options(choice(0, 3, 7)), **wrong)


def test_what_a_front_says_the_assignment_does() -> None:
    scores, cost = small_scores(), costs(100, 0, 50)
    profile = Profile(scores, cost, options(choice(0, 2, 4, 6, 7, error=0.004), choice(0, 3, 7, error=0.02)))
    joint = profile.joint()
    for speedup in (1.0, 1.3, 1.6, 2.0, 2.6):
        ranked = joint.ranked(speedup)
        assert [each.error for each in ranked] == sorted(each.error for each in ranked)
        for each in ranked:
            found = joint.assignment(each)
            assert found.steps == each.steps and found.speedup >= speedup * (1 - 1e-9)
            assert found.total() <= each.error + 1e-12  # by the last improvement of the knapsack
            assert each.error - found.total() <= _largest(scores)
    turned = joint.ranked(1.6, Correction(forwards=0.0))
    assert turned[0].heads_error == min(each.heads_error for each in turned) and len(turned) == 3
    slow = joint.ranked(1.6, slow=lambda steps: 1.5 if steps else 1.0)
    assert {each.speedup for each in slow} == {1.6, 1.6 * 1.5}
    assert joint.fastest() > joint.fastest(lambda steps: 2.0)


def test_what_was_measured_takes_the_place_of_what_was_predicted() -> None:
    scores, cost = small_scores(), costs(100, 0, 50)
    good, bad, slow = (
        choice(0, 2, 5, 7, error=0.004),
        choice(0, 1, 5, 7, error=0.002),
        choice(0, 2, 3, 4, 5, 7, error=0.001),
    )
    joint = Joint(scores, cost, options(good, bad, slow))

    def ranked(measured_first: bool = False) -> list[StepChoice]:
        some = joint.ranked(1.3, Correction(heads=0.0), measured_first=measured_first)
        return [each.steps for each in some if each.steps]

    assert ranked() == [slow, bad, good]
    joint.learn({bad.forwards: 0.5})
    known = replace(bad, error=0.5, measured=True)
    assert ranked() == [slow, good, known] and ranked(measured_first=True) == [known, slow, good]
    assert joint.steps.choices == (good, known, slow)


def test_no_more_choices_are_run_alone_than_that() -> None:
    scores, cost = small_scores(), costs(100, 0, 50)
    joint = Joint(scores, cost, options(*(choice(0, inner, 5, 7, error=1e-3 * inner) for inner in range(1, 5))))
    tried: list[Forwards] = []

    def measure(forwards: Forwards) -> float:
        tried.append(forwards)
        return 0.5

    def rank(enough: bool) -> list[Expected]:
        return joint.ranked(1.3, Correction(heads=1e6), measured_first=enough)

    ranked = StepsAlone(joint, measure, 2, lambda line: None).settle(rank, breadth=3)
    assert len(tried) == 2 and ranked[0].steps is not None and ranked[0].steps.forwards in tried
