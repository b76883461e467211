"""The front of a search: what each scope can do alone and both together, as plans, numbers and a page."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffusers_accel.evals.report.charts import expected_front
from diffusers_accel.files import load_document
from diffusers_accel.plan import Plan
from diffusers_accel.search.cost import Cost
from diffusers_accel.search.profile import Profile
from diffusers_accel.search.reach import OutOfReach
from diffusers_accel.tune.front import BOTH, HEADS, MOST, STEPS, Front, find_front
from diffusers_accel.tune.front_files import KIND, PREDICTED, _File, save_front
from tests.search.test_assign import costs, random_scores
from tests.search.test_joint import choice, options, small_scores


def profile(**changes: Any) -> Profile:
    steps = options(
        choice(0, 2, 4, 6, 7, error=0.004), choice(0, 3, 7, error=0.02), choice(0, 1, 2, 3, 5, 7, error=0.001)
    )
    return replace(Profile(small_scores(), costs(100.0, 0.0, 50.0), steps), **changes)


def at(front: Front, name: str, speedup: float) -> float:
    """The least error of the curve's points that are as fast, which is what a plan of it costs at most."""
    return min((error for x, error in front.curves[name] if x >= speedup * (1 - 1e-6)), default=np.inf)


def test_both_scopes_together_are_never_worse_than_either() -> None:
    front = find_front(profile())
    assert list(front.curves) == [BOTH, HEADS, STEPS]
    for name, curve in front.curves.items():
        speedups, errors = zip(*curve)
        assert list(speedups) == sorted(speedups) and all(a <= b + 1e-12 for a, b in itertools.pairwise(errors)), name
    joint = profile().joint()
    for name in (HEADS, STEPS):
        for speedup, error in front.curves[name]:
            assert joint.ranked(speedup)[0].error <= error + 1e-12
    # Three of eight steps, dense heads: 1 / (0.1 + 0.9 x 3 / 8).
    assert front.curves[STEPS][-1][0] == pytest.approx(1 / (0.1 + 0.9 * 3 / 8)) and front.curves[STEPS][-1][1] == 0.02
    # Heads that read nothing: attention is 0.6 of a generation.
    assert front.curves[HEADS][-1][0] == pytest.approx(2.5)
    assert front.curves[BOTH][-1][0] > 2.5 and at(front, HEADS, 2.6) == np.inf


def test_plans_stand_on_the_front_and_are_as_fast_as_they_are_asked_to_be() -> None:
    found = profile()
    front = find_front(found)
    assert 2 <= len(front.plans) <= MOST and list(front.plans) == sorted(front.plans)
    assert min(front.plans) == 1.1 and max(front.plans) <= found.joint().fastest()
    for asked, plan in front.plans.items():
        assert plan.speedup >= asked * (1 - 1e-9) and plan.gap is not None
        assert plan.total() <= found.joint().ranked(asked)[0].error + 1e-12
    assert list(find_front(found, [2, 1.5]).plans) == [1.5, 2.0]


def test_without_step_caches_or_with_those_of_another_search() -> None:
    strange = replace(profile().steps, config={"seed": 3})  # type: ignore[type-var]
    for steps in (None, strange):
        front = find_front(profile(steps=steps))
        assert list(front.curves) == [HEADS] and all(each.steps is None for each in front.plans.values())


def test_dense_steps_are_kept() -> None:
    front = find_front(profile(), dense_steps=0.25)
    assert front.curves[BOTH][-1][0] < find_front(profile()).curves[BOTH][-1][0]
    assert all(not plan.choice["transformer"][0].any() for plan in front.plans.values())


def test_what_cannot_be_had_is_refused() -> None:
    with pytest.raises(OutOfReach, match="a speed-up of 9 is out of reach"):
        find_front(profile(), [9])
    slow = find_front(profile(cost=costs(100.0, 100.0, 100.0), steps=None))
    assert slow.plans == {} and slow.curves == {HEADS: ()}
    for wrong in ([1.0], [0.5, 2], [float("inf")], []):
        with pytest.raises(ValueError, match="speedups: expected factors above 1"):
            find_front(profile(), wrong)
    with pytest.raises(ValueError, match="expected scores whose spans were measured"):
        find_front(profile(scores=random_scores(), steps=None))


def test_the_files_say_what_is_predicted(tmp_path: Path) -> None:
    ms = {"transformer": (100.0, 0.0, 50.0)}
    found = profile(cost=Cost(ms, ms, "a <b> device", 100, 1, 3))
    front = find_front(found, [1.5, 2.5])
    page = save_front(front, found, tmp_path / "front")
    told = load_document(tmp_path / "front" / "front.json", KIND, _File)
    assert told.predicted and {name: tuple(curve) for name, curve in told.curves.items()} == front.curves
    assert [row.file for row in told.plans] == ["plan-1.5x.json", "plan-2.5x.json"]
    for row in told.plans:
        plan, expected = Plan.load(tmp_path / "front" / row.file), front.plans[row.asked]
        assert (
            plan.provenance["predicted"]["speedup"] == row.speedup == expected.speedup
            and "tuned" not in plan.provenance
        )
        assert plan.forwards == (expected.steps.forwards if expected.steps else None)
        assert row.error == expected.total() and row.gap == expected.gap
    text = page.read_text(encoding="utf-8")
    assert PREDICTED in text and "a &lt;b&gt; device" in text and "<b>" not in text
    assert "measured" not in text.lower().replace("none of these", "") and "plan-2.5x.json" in text
    assert not re.search(r'(src|href)="(?!data:|#)', text), "the page needs nothing else"
    save_front(front, found, tmp_path / "front")  # once more, over the old one


def test_the_chart_has_each_curve_and_no_error_of_zero() -> None:
    svg = expected_front(
        {"one": [(1.1, 0.0), (2.0, 0.5)], "<two>": [(1.5, 0.01)], "none": [], "zero": [(3.0, 0.0)]},
        [(1.2, 0.1), (1.0, 0.0)],
    )
    assert "one" in svg and "&lt;two&gt;" in svg and "<two>" not in svg and "up to 2.00x, at an error of 0.5" in svg
    assert "mathdefault" not in svg and ">0.1<" in re.sub(r"\s", "", svg)
    assert "zero: up to" not in svg and "none: up to" not in svg
    assert expected_front({}, []).startswith("<svg")
