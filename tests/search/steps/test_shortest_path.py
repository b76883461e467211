"""The shortest path is the best of all sets of computed steps."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from diffusers_accel.search.steps.shortest_path import shortest_paths
from diffusers_accel.search.steps.state_graph import State, StateGraph


def cost_of(graph: StateGraph, costs: dict[State, dict[int, float]], computed: tuple[int, ...]) -> float:
    """Of one set of steps, by walking over it; infinite where a run is too long or passes over an expert's first step."""
    state, total = graph.start, 0.0
    for end in computed[1:]:
        total += costs[state].get(end, np.inf)
        if not np.isfinite(total):
            return total
        state = (end,) if end in graph.fresh else (*state, end)[-graph.looks_back :]
    return total


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("looks_back", [1, 2, 3])
@pytest.mark.parametrize("fresh", [(0,), (0, 3)], ids=["one model", "two experts"])
@pytest.mark.parametrize("longest", [12, 2])
def test_it_is_the_best_of_all_subsets(seed: int, looks_back: int, fresh: tuple[int, ...], longest: int) -> None:
    steps, rng = 8, np.random.default_rng(seed)
    graph = StateGraph(steps, fresh, looks_back, longest)
    costs = {state: {end: float(rng.random()) for end in graph.ends(state)} for state in graph.states()}
    found = shortest_paths(graph, costs)
    inner = range(1, steps - 1)
    reached = 0
    for count in range(2, steps + 1):
        every = [(0, *some, steps - 1) for some in combinations(inner, count - 2)]
        best = min(cost_of(graph, costs, each) for each in every)
        if np.isfinite(best):
            computed, cost = found[count]
            assert len(computed) == count and cost == pytest.approx(best)
            assert cost_of(graph, costs, computed) == pytest.approx(best)
            reached += 1
        else:
            assert count not in found
    assert reached == len(found) > 3


@pytest.mark.parametrize(("steps", "expected"), [(1, {1: (0,)}), (2, {2: (0, 1)}), (3, {2: (0, 2), 3: (0, 1, 2)})])
def test_schedules_of_few_steps(steps: int, expected: dict[int, tuple[int, ...]]) -> None:
    graph = StateGraph(steps, (0,), 1)
    costs = {state: {end: float(end - state[-1] - 1) for end in graph.ends(state)} for state in graph.states()}
    assert {count: computed for count, (computed, _) in shortest_paths(graph, costs).items()} == expected
