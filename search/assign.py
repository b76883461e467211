"""Which candidate each head takes: pure, deterministic, numpy only, seconds on a CPU for any model.

A speed-up or a density is a limit on the sum of costs over all heads and calls, under which the sum of errors is minimised
(`search.knapsack`). Every step runs here; one budget over heads and step caches is `search.joint`.

The paper's own rule (Sparse-vDiT, arXiv 2506.03065, Eq. 2 and 3) is there as `Budget.sparse_vdit`. Its Algorithm 1 prints the
penalty with the opposite sign; Eq. 2 is taken, the only reading that rewards sparsity.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from diffusers_accel.methods import Method
from diffusers_accel.search.assignment import (
    Assignment,
    Tables,
    build_tables,
    find_weights,
    least_cost,
    least_error,
    summary,
)
from diffusers_accel.search.budget import Budget
from diffusers_accel.search.cost import Cost
from diffusers_accel.search.reach import OutOfReach, attention_ratio, density_out_of_reach, faster
from diffusers_accel.search.scores import DENSE, Scores


def assign(
    scores: Scores,
    cost: Cost,
    budget: Budget,
    *,
    dense_steps: float = 0.0,
    span_weights: Sequence[float] | None = None,
    among: Collection[Method] | None = None,
    exact: bool = False,
) -> Assignment:
    """The assignment with the least error inside the budget.

    Args:
        scores: what the probe measured.
        cost: time of each candidate per head, on the device of use.
        budget: see `Budget`.
        dense_steps: share of the schedule, from its start, that stays dense and is computed; must be a border of a span.
        span_weights: how much an error in each span matters, beside its number of calls, in whichever layer; None: as the scores
            measured it, for each span and layer.
        among: the candidates that may be taken beside dense; None: all.
        exact: solve a density or a speed-up as an integer program, with scipy; else the choice is at most one head away from the
            optimum. Either way `Assignment.gap` says how far off it may be.

    Raises:
        ImportError: `exact`, without scipy.
        OutOfReach: no plan keeps the budget.
        ValueError: an argument does not fit.
    """
    tables = build_tables(scores, cost, find_weights(scores, span_weights), dense_steps, among)
    if budget.kind == "sparse_vdit":
        choice = {name: table.sparse_vdit(scores, name, budget) for name, table in tables.items()}
        return summary(scores, tables, tables, choice)
    return _within(budget, scores, tables, exact)


def _within(budget: Budget, scores: Scores, tables: Tables, exact: bool) -> Assignment:
    """The assignment of all steps that keeps a density or a speed-up."""
    costs = {name: table.time if budget.kind == "speedup" else table.density for name, table in tables.items()}
    dense = sum(float(cost[..., DENSE].sum()) for cost in costs.values())
    ratio = budget.value if budget.kind == "density" else attention_ratio(scores.attention_share, budget.value)
    try:
        choice, bound = least_error(tables, costs, dense * ratio, exact)
        return summary(scores, tables, tables, choice, bound=bound)
    except OutOfReach:
        raise OutOfReach(_out_of_reach(scores, budget, least_cost(tables, costs) / dense)) from None


def _out_of_reach(scores: Scores, budget: Budget, least: float) -> str:
    if budget.kind == "density":
        return density_out_of_reach(budget, least)
    share = scores.attention_share
    most = faster(share, least)
    return (
        f"a speed-up of {budget.value:g} is out of reach: self-attention takes {share:.0%} of a generation here and the "
        f"fastest plan leaves {least:.0%} of that, so that {most:.2f} is the most; ask for less, or for fewer dense steps"
    )
