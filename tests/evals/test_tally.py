"""What one comparison saw, and what it makes of times on a machine that drifts."""

from __future__ import annotations

from collections import Counter

import pytest

from diffusers_accel.evals.order import order
from diffusers_accel.evals.report import Clip
from diffusers_accel.evals.tally import SubjectTally, noise_rows, speed_rows


def tally(times: list[list[float]], middles: list[list[float]]) -> SubjectTally:
    return SubjectTally(times=times, middles=middles)


def test_every_subject_stands_in_every_place_as_often() -> None:
    names = ["a", "b", "c"]
    turns = [order(names, turn) for turn in range(6)]
    assert all(sorted(turn) == names for turn in turns) and turns[:3] == turns[3:]
    assert all(set(Counter(place).values()) == {2} for place in zip(*turns, strict=True))
    assert order(names, 0) == turns[0] != names and order(["a"], 5) == ["a"]


def test_a_run_is_held_against_dense_at_its_own_time() -> None:
    """Dense gets slower at a constant pace: a subject of half its time is twice as fast wherever it runs."""
    dense = tally([[100.0, 140.0], [100.0, 140.0, 100.0]], [[0.0, 400.0], [0.0, 400.0, 800.0]])
    early, late = [[55.0], [60.0, 60.0]], [[65.0], [50.0, 70.0]]
    assert tally(early, [[100.0], [200.0, 600.0]]).speedups(dense) == pytest.approx([2.0, 2.0])
    assert tally(late, [[300.0], [0.0, 400.0]]).speedups(dense) == pytest.approx([2.0, 2.0])
    clips = [Clip("a", 0), Clip("b", 0)]
    assert next(speed_rows("late", tally(late, [[300.0], [0.0, 400.0]]), dense, clips, {})).value == pytest.approx(2.0)


def test_drift_to_both_sides_is_no_rest() -> None:
    dense = tally([[100.0, 120.0], [100.0, 80.0], [100.0, 100.0], [100.0, 110.0]], [[0.0, 1.0]] * 4)
    drift = next(noise_rows(dense, [0.0], 0.0, {}))
    assert drift.value == pytest.approx(0.15) and drift.note == "-20.0% to +20.0%"
    one = next(noise_rows(tally([[100.0, 92.0]], [[0.0, 1.0]]), [0.0], 0.0, {}))
    assert one.value == pytest.approx(0.08) and one.note == "-8.0% in the one clip"
