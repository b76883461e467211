"""How far the assignment may be from the best one: against an integer program that knows nothing of hulls."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from scipy.optimize import Bounds, LinearConstraint, milp

from diffusers_accel.search import exact, plan_search
from diffusers_accel.search.assign import assign
from diffusers_accel.search.assignment import Assignment, gap_words
from diffusers_accel.search.budget import Budget
from diffusers_accel.search.exact import improved
from diffusers_accel.search.joint import Joint
from diffusers_accel.search.knapsack import bound_and_price, knapsack
from diffusers_accel.search.plan_making import make_plan
from diffusers_accel.search.scores import Scores
from tests.search.test_assign import cost_of, costs, make_scores, random_scores, tables, total
from tests.search.test_joint import best_of, choice, options, small_scores

Array = np.ndarray[Any, np.dtype[Any]]


def oracle(error: Array, cost: Array, limit: float) -> float:
    """The least total error, of all options."""
    items, count = error.shape
    one_each = np.kron(np.eye(items), np.ones(count))
    allowed = np.isfinite(error.ravel())
    unit = 1e5 / max(
        float(error.max(1, where=np.isfinite(error), initial=0.0).sum()), 1.0
    )  # the solver's tolerances are absolute
    found = milp(
        np.where(allowed, error.ravel(), 0.0) * unit,
        integrality=np.ones(error.size),
        bounds=Bounds(0, allowed.astype("f8")),
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(cost.ravel()[None], -np.inf, limit)],
        options={"mip_rel_gap": 0.0},
    )
    assert found.status == 0
    return float(found.fun) / unit


def problem(items: int, count: int, seed: int) -> tuple[Array, Array]:
    """Errors that fall as costs grow, with what is not allowed and what never pays among them."""
    random = np.random.default_rng(seed)
    cost = np.sort(random.uniform(0, 1, (items, count)), axis=1)[:, ::-1].copy()
    error = random.lognormal(-3, 2, (items, 1)) * (1 - cost) ** random.uniform(0.5, 4, (items, 1))
    error = error * random.uniform(0.8, 1.2, error.shape)
    error[:, 0] = 0.0
    error[random.random(error.shape) < 0.1] = np.inf
    error[:, 0] = 0.0
    return error, cost


@pytest.mark.parametrize("items, count", [(3, 4), (12, 6), (60, 8), (200, 10)])
@pytest.mark.parametrize("share", [0.15, 0.3, 0.6, 0.9])
@pytest.mark.parametrize("seed", range(2))
def test_against_an_integer_program(items: int, count: int, share: float, seed: int) -> None:
    error, cost = problem(items, count, seed)
    least = np.where(np.isfinite(error), cost, np.inf).min(1).sum()
    limit = least + share * (cost[:, 0].sum() - least)
    found = knapsack(error, cost, limit)
    bound, price = bound_and_price(error, cost, limit)
    best = oracle(error, cost, limit)
    near = 1e-6 * max(best, 1e-3)
    assert bound - near <= best <= total(error, found) + near
    # The relaxation's optimum is that of its dual at the price.
    dual = np.where(np.isfinite(error), error + price * cost, np.inf).min(1).sum() - price * limit
    assert bound == pytest.approx(dual, rel=1e-6, abs=1e-9)
    solved, proven = improved(error, cost, limit, found)
    assert total(cost, solved) <= limit * (1 + 1e-9)
    assert total(error, solved) == pytest.approx(best, rel=1e-6, abs=near) and proven == total(error, solved)


@settings(max_examples=60, deadline=None)
@given(tables)
def test_whole_numbers_with_ties(table: Any) -> None:
    error, cost = (np.array(each) for each in table)
    for limit in np.linspace(cost.min(1).sum(), cost.max(1).sum(), 4):
        found = knapsack(error, cost, float(limit))
        best = oracle(error, cost, float(limit) * (1 + 1e-9))
        assert bound_and_price(error, cost, float(limit))[0] <= best + 1e-6
        solved, proven = improved(error, cost, float(limit), found)
        assert total(error, solved) == pytest.approx(best, abs=1e-6) and proven <= best + 1e-6


def test_where_time_runs_out_the_bound_stays_true() -> None:
    error, cost = problem(200, 10, 5)
    limit = 0.3 * cost[:, 0].sum()
    found = knapsack(error, cost, limit)
    solved, bound = improved(error, cost, limit, found, seconds=0.0)
    best = oracle(error, cost, limit)
    assert bound <= best * (1 + 1e-6) and best * (1 - 1e-6) <= total(error, solved) <= total(error, found)


def test_out_of_reach() -> None:
    with pytest.raises(ValueError, match="out of reach, the least possible is 3"):
        bound_and_price(np.zeros((2, 2)), np.array([[1.0, 5.0], [2.0, 5.0]]), 2.0)


@pytest.mark.parametrize("budget", [Budget.density(0.4), Budget.speedup(1.3)])
def test_an_assignment_says_its_gap_and_exactly_there_is_none(budget: Budget) -> None:
    scores = random_scores(3)
    near, best = (assign(scores, cost_of(scores), budget, exact=each) for each in (False, True))
    assert near.bound is not None and near.gap is not None and best.gap is not None
    assert near.bound - 1e-12 <= best.total() <= near.total() and best.gap < 1e-9
    assert best.bound == pytest.approx(best.total()) and near.gap == pytest.approx(1 - near.bound / near.total())
    told = make_plan(scores, cost_of(scores), near, budget).provenance["assignment"]
    assert told == {"error": near.total(), "bound": near.bound, "gap": near.gap}
    rule = assign(scores, cost_of(scores), Budget.sparse_vdit())
    assert rule.gap is None and "assignment" not in make_plan(scores, cost_of(scores), rule, budget).provenance


@pytest.mark.parametrize("speedup", [1.2, 1.6, 2.0, 2.6])
@pytest.mark.parametrize("seed", range(3))
def test_the_gap_of_steps_and_heads_is_that_of_all_pairs(speedup: float, seed: int) -> None:
    scores, cost = small_scores(seed), costs(100.0, 0.0, 50.0)
    steps = options(
        choice(0, 2, 4, 6, 7, error=0.004), choice(0, 3, 7, error=0.02), choice(0, 1, 2, 3, 5, 7, error=0.001)
    )
    near, best = (best_of(scores, cost, speedup, steps, exact=each) for each in (False, True))
    joint = Joint(scores, cost, steps, exact=True)
    alone = [joint.assignment(each).total() for each in joint.ranked(speedup)]
    assert best.total() == pytest.approx(min(alone)) and best.gap is not None and best.gap < 1e-9
    assert near.bound is not None and near.bound <= min(alone) + 1e-12 and near.total() >= min(alone) - 1e-12
    assert best.speedup >= speedup * (1 - 1e-9)


@pytest.mark.parametrize("exactly", [False, True])
def test_the_bound_is_that_of_all_choices_of_steps(exactly: bool) -> None:
    """Of two choices of steps the one with the larger error may have the lower bound, and the other way round."""
    scores, cost, fast = small_scores(), costs(100.0, 0.0, 50.0), 2.6  # which no heads reach alone
    found = {}
    for computed in ((0, 2, 4, 6, 7), (0, 3, 7)):
        steps = options(choice(*computed, error=0.0))
        (expected,) = Joint(scores, cost, steps).ranked(fast)
        least = Joint(scores, cost, steps).assignment(expected).bound
        error = Joint(scores, cost, steps, exact=True).assignment(expected).total() if exactly else expected.heads_error
        assert least is not None
        found[computed] = error, error - least
    near, wide = sorted(found, key=lambda each: found[each][1])
    apart = (found[wide][1] - found[near][1]) / 2
    assert apart > 1e-6
    errors = {near: 1 - found[near][0], wide: 1 + apart - found[wide][0]}
    both = options(*(choice(*computed, error=error) for computed, error in errors.items()))
    best = best_of(scores, cost, fast, both, exact=exactly)
    assert best.steps is not None and best.steps.computed == near
    assert best.bound == pytest.approx(1 if exactly else 1 + apart - found[wide][1], rel=1e-9)
    assert 1 + apart - found[wide][1] < 1 - found[near][1]


def large() -> Scores:
    """60 layers of 40 heads, 30 candidates, 4 spans."""
    random = np.random.default_rng(0)
    densities = np.array([1.0, 0.0, *np.linspace(0.05, 0.9, 28)])
    error = random.lognormal(-3, 2, (4, 60, 40, 1)) * (1 - densities) ** random.uniform(0.5, 4, (4, 60, 40, 1))
    error *= random.uniform(0.5, 1.5, error.shape)
    spans = ((0.0, 0.1), (0.1, 0.3), (0.3, 0.6), (0.6, 1.0))
    return make_scores(error, densities=densities, spans=spans, calls=(10, 20, 30, 40))


def test_a_large_model_takes_seconds() -> None:
    scores = large()
    begin = time.process_time()
    near = assign(scores, cost_of(scores), Budget.density(0.3))
    assert time.process_time() - begin < 6  # the bar is 2 s of wall time on an idle core
    assert near.gap is not None and 0 < near.gap < 1e-3 and 0.29 < near.density <= 0.3
    near = assign(scores, cost_of(scores), Budget.density(0.5))
    begin = time.process_time()
    best = assign(scores, cost_of(scores), Budget.density(0.5), exact=True)
    assert time.process_time() - begin < 60  # 20 s of the solver
    assert best.gap is not None and best.gap < 1e-7 and best.total() < near.total()


def test_what_is_said_of_a_gap() -> None:
    assert gap_words(None) == "" and gap_words(0.0) == ", the best choice"
    assert gap_words(0.0123) == ", its choice within 1.23% of the best one" and "0.01%" in gap_words(2e-5)
    found = replace(Assignment({}, 0.1, 0.5, 0.5, 1.5, heads_error=2.0), bound=1.0)
    assert found.gap == 0.5 and plan_search._expected(found).endswith(", its choice within 50.00% of the best one")
    assert Assignment({}, 0.1, 0.5, 0.5, 1.5, bound=0.0).gap == 0.0


def test_exact_without_scipy_is_refused_before_the_search(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "scipy.optimize", None)
    with pytest.raises(ImportError, match=r"exact: expected scipy, found none; pip install '.\[eval\]'"):
        exact.check_solver()
