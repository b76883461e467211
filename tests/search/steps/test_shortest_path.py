"""The path that is found beside the best of all sets of computed steps."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations

import pytest
import torch
from torch import Tensor

from diffusers_accel.search.steps.shortest_path import best_paths
from diffusers_accel.search.steps.state_graph import State, StateGraph

STEPS = 8


def error_of(
    graph: StateGraph, errors: Mapping[State, Mapping[int, Tensor]], computed: tuple[int, ...]
) -> float | None:
    """Of one set of steps, by walking over it; None where a run is too long or passes over an expert's first step."""
    state, total = graph.start, torch.zeros(3)
    for end in computed[1:]:
        if end not in errors[state]:
            return None
        total = total + errors[state][end]
        state = (end,) if end in graph.fresh else (*state, end)[-graph.looks_back :]
    return float(total.square().sum())


def drawn_errors(graph: StateGraph, seed: int) -> dict[State, dict[int, Tensor]]:
    """Longer runs have larger errors, of any direction."""
    generator = torch.Generator().manual_seed(seed)
    return {
        state: {end: (end - state[-1] - 1) * torch.randn(3, generator=generator) for end in graph.ends(state)}
        for state in graph.states()
    }


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("looks_back", [1, 2, 3])
@pytest.mark.parametrize("fresh", [(0,), (0, 3)], ids=["one model", "two experts"])
@pytest.mark.parametrize("longest", [12, 2])
def test_it_is_the_best_of_all_subsets(seed: int, looks_back: int, fresh: tuple[int, ...], longest: int) -> None:
    """Exactly, where all ways are kept; with those that are kept as a rule it is not far off."""
    graph = StateGraph(STEPS, fresh, looks_back, longest)
    errors = drawn_errors(graph, seed)
    exact, usual = best_paths(graph, errors, 1000), best_paths(graph, errors)
    assert exact.keys() == usual.keys()
    for count in range(2, STEPS + 1):
        every = [(0, *some, STEPS - 1) for some in combinations(range(1, STEPS - 1), count - 2)]
        reached = [error for each in every if (error := error_of(graph, errors, each)) is not None]
        assert bool(reached) == (count in exact)
        if reached:
            assert len(exact[count]) == len(usual[count]) == count
            assert error_of(graph, errors, exact[count]) == pytest.approx(min(reached), abs=1e-9)
            found = error_of(graph, errors, usual[count])
            assert found is not None and sum(error < found - 1e-9 for error in reached) <= len(reached) // 10


def test_errors_against_each_other_are_found() -> None:
    """Neither run is the least wrong one, but together they are right."""
    graph = StateGraph(5, (0,), 1)
    errors = {
        state: {end: torch.ones(1) * (end > state[-1] + 1) for end in graph.ends(state)} for state in graph.states()
    }
    errors[(0,)][2] = torch.tensor([3.0])
    errors[(2,)][4] = torch.tensor([-3.0])
    assert best_paths(graph, errors)[3] == (0, 2, 4)


@pytest.mark.parametrize(("steps", "expected"), [(1, {1: (0,)}), (2, {2: (0, 1)}), (3, {2: (0, 2), 3: (0, 1, 2)})])
def test_schedules_of_few_steps(steps: int, expected: dict[int, tuple[int, ...]]) -> None:
    graph = StateGraph(steps, (0,), 1)
    assert best_paths(graph, drawn_errors(graph, 0)) == expected
