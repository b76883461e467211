"""The best set of computed steps, for every number of them at once.

What counts is the square of a sum: errors of two runs may point the same way or against each other. For such an aim no programme
over states is exact, since the best way to a state need not be part of the best way through it. So a few ways to each (state,
number of computed steps) are kept, those of least error so far.
"""

from __future__ import annotations

from collections import defaultdict
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
    arriving: dict[State, dict[int, _Ways]] = defaultdict(dict)
    arriving[graph.start][1] = _Ways([graph.start], zero[None])
    found: dict[int, _Ways] = {}
    for state in graph.states():
        here = arriving.pop(state)  # whatever leads to a state ends before it
        if state[-1] == graph.steps - 1:
            for count, some in here.items():
                found[count] = _best(1, some, found.get(count))
        for end in graph.ends(state):
            there = arriving[graph.after(state, end)]
            for count, some in here.items():
                longer = _Ways([(*path, end) for path in some.paths], some.errors + errors[state][end])
                there[count + 1] = _best(ways, longer, there.get(count + 1))
    return {count: some.paths[0] for count, some in sorted(found.items())}


def _best(ways: int, some: _Ways, others: _Ways | None) -> _Ways:
    """At most so many of both, the least wrong ones first."""
    paths = some.paths + (others.paths if others else [])
    errors = torch.cat([some.errors, others.errors]) if others else some.errors
    order = errors.square().sum(1).argsort(stable=True)[:ways]
    return _Ways([paths[place] for place in order.tolist()], errors[order])
