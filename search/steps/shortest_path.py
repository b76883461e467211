"""The best set of computed steps, for every number of them at once."""

from __future__ import annotations

from collections.abc import Mapping

from diffusers_accel.search.steps.run_errors import RunErrors
from diffusers_accel.search.steps.state_graph import State, StateGraph


def shortest_paths(graph: StateGraph, costs: RunErrors) -> dict[int, tuple[tuple[int, ...], float]]:
    """Number of computed steps -> the steps, and the sum of what the runs between them cost. The least sum there is, by dynamic
    programming over (state, how many are computed).

    Args:
        costs: of the run from a state to the step that is computed next, 0 or more; they add up.
    """
    best: dict[State, dict[int, tuple[float, State | None]]] = {graph.start: {1: (0.0, None)}}
    for state in graph.states():
        for end in graph.ends(state):
            cost, ways = costs[state][end], best.setdefault(graph.after(state, end), {})
            for count, (before, _) in best[state].items():
                if count + 1 not in ways or before + cost < ways[count + 1][0]:
                    ways[count + 1] = (before + cost, state)
    found: dict[int, tuple[tuple[int, ...], float]] = {}
    for state, ways in best.items():
        if state[-1] == graph.steps - 1:
            for count, (cost, _) in ways.items():
                if count not in found or cost < found[count][1]:
                    found[count] = (_back(best, state, count), cost)
    return dict(sorted(found.items()))


def _back(
    best: Mapping[State, Mapping[int, tuple[float, State | None]]], state: State | None, count: int
) -> tuple[int, ...]:
    """The computed steps on the way to a state."""
    steps = []
    while state is not None:
        steps.append(state[-1])
        state, count = best[state][count][1], count - 1
    return tuple(reversed(steps))
