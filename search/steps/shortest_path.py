"""The best set of computed steps, for every number of them at once.

What counts is the square of a sum: errors of two runs may point the same way or against each other. For such an aim no programme
over states is exact, since the best way to a state need not be part of the best way through it. So a few ways to each (state,
number of computed steps) are kept, those of least error so far.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from diffusers_accel.search.steps.run_errors import RunErrors
from diffusers_accel.search.steps.state_graph import State, StateGraph

WAYS = 16  # that are kept
Path = tuple[int, ...]


class _Ways(NamedTuple):
    """Ways to one state with one number of computed steps."""

    paths: list[Path]
    errors: Tensor  # [ways, elements], their sums so far


def best_paths(graph: StateGraph, errors: RunErrors, ways: int = WAYS) -> dict[int, Path]:
    """Number of computed steps -> the steps of least error found.

    Args:
        errors: of each run, from a state to the step that is computed next, [elements] each; they add up.
        ways: that are kept for each state and number of steps. With as many as there are, the result is the best one.
    """
    zero = torch.zeros_like(errors[graph.start][1]) if graph.steps > 1 else torch.zeros(1)
    found: dict[State, dict[int, _Ways]] = {graph.start: {1: _Ways([graph.start], zero[None])}}
    arriving: dict[State, dict[int, list[_Ways]]] = defaultdict(lambda: defaultdict(list))
    for state in graph.states():
        if state in arriving:
            found[state] = {count: _best(some, ways) for count, some in arriving.pop(state).items()}
        for end in graph.ends(state):
            then = graph.after(state, end)
            for count, here in found[state].items():
                paths = [(*path, end) for path in here.paths]
                arriving[then][count + 1].append(_Ways(paths, here.errors + errors[state][end]))
    return _of_the_end(graph, found)


def _best(some: list[_Ways], ways: int) -> _Ways:
    paths, errors = [path for each in some for path in each.paths], torch.cat([each.errors for each in some])
    order = errors.square().sum(1).argsort(stable=True)[:ways]
    return _Ways([paths[place] for place in order.tolist()], errors[order])


def _of_the_end(graph: StateGraph, found: Mapping[State, Mapping[int, _Ways]]) -> dict[int, Path]:
    """The best of all states whose last step is that of the schedule."""
    ends: dict[int, list[_Ways]] = defaultdict(list)
    for state, counts in found.items():
        if state[-1] == graph.steps - 1:
            for count, here in counts.items():
                ends[count].append(here)
    return {count: _best(some, 1).paths[0] for count, some in sorted(ends.items())}
