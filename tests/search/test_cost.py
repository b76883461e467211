"""The cost: what is timed, and that a reusing call really reuses."""

from __future__ import annotations

import pytest

from diffusers_accel.layout import TokenLayout
from diffusers_accel.methods import DENSE, AxisOrder, Band, Draft, Kept, Method, Patches, Stored
from diffusers_accel.search import cost
from diffusers_accel.search.candidates import candidates
from diffusers_accel.search.cost import alike, launch_all, time_candidates
from tests.search.test_measure import HEADS, qkv
from tests.stages import CPU, call_of, sdpa

LAYOUT = TokenLayout(4, 10, 12)


def test_only_what_differs_in_cost_is_timed():
    assert alike(Method(AxisOrder("wfh"), Stored(0.3))) == alike(Method(AxisOrder("hwf"), Stored(0.3)))
    assert alike(Method(select=Band(0.3))) == Method(select=Band(0.3)) != alike(Method(AxisOrder("hwf"), Band(0.3)))
    assert alike(Method(Patches(), Draft(0.3))) != alike(Method(Patches(), Draft(0.3), "int8"))
    methods = candidates()
    assert len(methods) == 50 and len({alike(method) for method in methods}) == 38


def test_a_held_selection_is_timed_with_and_without_selecting(monkeypatch):
    methods = (DENSE, Method(Patches(4, 8), Draft(0.4, reselect_every=3)))
    call = call_of(LAYOUT, HEADS, dense=sdpa)
    planned = [launch_all(alike(method), call, {}, CPU) for method in methods]
    steps: list[int] = []

    def recorded(self, call, order, tensors, inputs):
        steps.append(call.now[0])
        return stock(self, call, order, tensors, inputs)

    stock = Draft.pattern
    monkeypatch.setattr(Draft, "pattern", recorded)
    ms, _ = time_candidates(planned, call, *qkv(LAYOUT), 0.001)
    assert (ms > 0).all() and set(steps) == {0}, "later steps of a cycle read what was selected at its first"


def test_refreshing_and_reusing_calls_are_timed_apart(monkeypatch):
    """Also where the clock is too coarse for one call: no refresh falls among the reusing calls."""
    methods = (DENSE, Method(select=Band(0.4)), Method(Patches(4, 8), Draft(0.4), rest=Kept(2)))
    call = call_of(LAYOUT, HEADS, dense=sdpa)
    planned = [launch_all(alike(method), call, {}, CPU) for method in methods]
    seen: list[tuple[int, int]] = []

    def recorded(partition, call, q, k, v, *memory):
        output = stock(partition, call, q, k, v, *memory)
        if memory:
            seen.append((call.now[0], output.reused))
        return output

    stock = cost.run
    monkeypatch.setattr(cost, "run", recorded)
    monkeypatch.setattr(cost, "MIN_SECONDS", 0.02)
    ms, rounds = time_candidates(planned, call, *qkv(LAYOUT), 0.001)
    assert ms.shape == (3, 2) and (ms > 0).all() and rounds == 3
    assert ms[:2, 0] == pytest.approx(ms[:2, 1])  # nothing is reused there
    assert {reused for step, reused in seen if step == 0} == {0}
    assert {reused for step, reused in seen if step > 0} == {HEADS}
    assert max(step for step, _ in seen) > 1
