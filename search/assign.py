"""Which steps run and which candidate each head takes: pure, deterministic, numpy only, seconds on a CPU for any model.

A speed-up or a density is a limit on the sum of costs over all heads and calls, under which the sum of errors is minimised
(`search.knapsack`). With step caches to choose from, a speed-up is one budget over both scopes: for each choice of computed
steps the heads get what time is left, and the pair with the least error of the final latents is taken.

The paper's own rule (Sparse-vDiT, arXiv 2506.03065, Eq. 2 and 3) is there as `Budget.sparse_vdit`. Its Algorithm 1 prints the
penalty with the opposite sign; Eq. 2 is taken, the only reading that rewards sparsity.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from diffusers_accel.methods import Method
from diffusers_accel.search.budget import Budget
from diffusers_accel.search.cost import Cost
from diffusers_accel.search.coverage import Coverage
from diffusers_accel.search.knapsack import knapsack
from diffusers_accel.search.reach import OutOfReach, attention_ratio, density_out_of_reach, faster
from diffusers_accel.search.schedule import is_border, is_open
from diffusers_accel.search.scores import DENSE, Array, Scores
from diffusers_accel.search.step_options import StepOptions
from diffusers_accel.search.steps.choice import StepChoice
from diffusers_accel.search.tables import Table

Tables = Mapping[str, Table]


@dataclass(frozen=True)
class Correction:
    """What real clips have shown of the error model: factors of the errors that it predicts.

    Args:
        heads: of the errors of sparse heads.
        forwards: of the errors of predicted steps.
    """

    heads: float = 1.0
    forwards: float = 1.0


NO_CORRECTION = Correction()


@dataclass(frozen=True)
class Assignment:
    """The choice for every head and of the steps that run, and what they are expected to do.

    Args:
        choice: per transformer, int [spans, layers, heads]: index of the candidate.
        error: mean over calls and layers of the layer's relative squared output error, as the probe predicts it.
        density: mean density of the whole run, 0..1; a predicted step counts as one that reads nothing.
        attention_ratio: attention time of the plan / dense attention time.
        speedup: expected factor for a whole generation.
        steps: the step cache, None where every step runs.
        heads_error: weighted error of the heads: where all spans were measured, the relative squared error of the final latents.
    """

    choice: dict[str, Array]
    error: float
    density: float
    attention_ratio: float
    speedup: float
    steps: StepChoice | None = None
    heads_error: float = 0.0

    def total(self, correction: Correction = NO_CORRECTION) -> float:
        """The expected error of both scopes together."""
        predicted = self.steps.error if self.steps else 0.0
        return correction.heads * self.heads_error + correction.forwards * predicted


def assign(
    scores: Scores,
    cost: Cost,
    budget: Budget,
    *,
    dense_steps: float = 0.0,
    span_weights: Sequence[float] | None = None,
    among: Collection[Method] | None = None,
    steps: StepOptions | None = None,
    correction: Correction = NO_CORRECTION,
) -> Assignment:
    """The assignment with the least error inside the budget.

    Args:
        scores: what the probe measured.
        cost: time of each candidate per head, on the device of use.
        budget: see `Budget`.
        dense_steps: share of the schedule, from its start, that stays dense and is computed; must be a border of a span.
        span_weights: how much an error in each span matters, beside its number of calls; None: as the scores measured it.
        among: the candidates that may be taken beside dense; None: all.
        steps: step caches to choose from, for a speed-up; None: every step runs.
        correction: of the predicted errors.

    Raises:
        OutOfReach: no plan keeps the budget.
        ValueError: an argument does not fit.
    """
    every = assign_each(
        scores,
        cost,
        budget,
        dense_steps=dense_steps,
        span_weights=span_weights,
        among=among,
        steps=steps,
    )
    return min(every, key=lambda each: each.total(correction))


def assign_each(
    scores: Scores,
    cost: Cost,
    budget: Budget,
    *,
    dense_steps: float = 0.0,
    span_weights: Sequence[float] | None = None,
    among: Collection[Method] | None = None,
    steps: StepOptions | None = None,
) -> list[Assignment]:
    """For every choice of steps that keeps the budget the assignment of the heads with the least error, that of all steps
    first, if it does. Arguments and errors as of `assign`.
    """
    if not scores.runs:
        raise ValueError("the scores hold no finished calibration run: probe at least one prompt first")
    weights = _span_weights(scores, span_weights)
    open_spans = _open_spans(scores, dense_steps)
    taken = np.array(
        [among is None or index == DENSE or method in among for index, method in enumerate(scores.candidates)]
    )
    tables = {name: Table.build(scores, cost, name, weights, open_spans, taken) for name in scores.models}
    if budget.kind == "sparse_vdit":
        choice = {name: table.sparse_vdit(scores, name, budget) for name, table in tables.items()}
        return [_summary(scores, tables, tables, choice)]
    if budget.kind == "density" or steps is None:
        return [_within(budget, scores, tables)]
    if len(scores.impacts) < len(scores.spans) or span_weights is not None:
        raise ValueError(
            "steps: expected scores whose spans were measured, by which errors of heads and of predicted steps are compared; "
            "leave span_weights out, or search without step caches"
        )
    return _over_steps(budget, scores, tables, weights, steps, dense_steps)


def _over_steps(
    budget: Budget, scores: Scores, tables: Tables, weights: Array, steps: StepOptions, dense_steps: float
) -> list[Assignment]:
    """The assignments of all choices of steps with which the budget can be kept."""
    found, fastest = [], 0.0
    for chosen in (None, *steps.choices):
        if chosen and not steps.computes_first(chosen, dense_steps):
            continue
        left = _covered(scores, tables, weights, steps, chosen)
        ratio = steps.attention_left(1 / budget.value, scores.attention_share, chosen)
        try:
            choice = _cheapest_error(left, {name: table.time for name, table in left.items()}, ratio * _dense(tables))
        except OutOfReach:
            least = _least(left, {name: table.time for name, table in left.items()}) / _dense(tables)
            fastest = max(fastest, steps.speedup(scores.attention_share, least, chosen))
        else:
            found.append(_summary(scores, tables, left, choice, steps, chosen))
    if not found:
        raise OutOfReach(
            f"a speed-up of {budget.value:g} is out of reach: step caches and sparse attention together make a generation here "
            f"{fastest:.2f} times as fast at most; ask for less"
        )
    return found


def _covered(
    scores: Scores, tables: Tables, weights: Array, steps: StepOptions, chosen: StepChoice | None
) -> dict[str, Table]:
    """The tables where only the chosen steps run."""
    if chosen is None:
        return dict(tables)
    return {
        name: table.under(Coverage.of(scores.spans, steps.transformers, name, chosen.computed), weights)
        for name, table in tables.items()
    }


def _dense(tables: Tables) -> float:
    """Time of dense attention in a generation of which every step runs."""
    return sum(float(table.time[..., DENSE].sum()) for table in tables.values())


def _within(budget: Budget, scores: Scores, tables: Tables) -> Assignment:
    """The assignment of all steps that keeps a density or a speed-up."""
    costs = {name: table.time if budget.kind == "speedup" else table.density for name, table in tables.items()}
    dense = sum(float(cost[..., DENSE].sum()) for cost in costs.values())
    ratio = budget.value if budget.kind == "density" else attention_ratio(scores.attention_share, budget.value)
    try:
        return _summary(scores, tables, tables, _cheapest_error(tables, costs, dense * ratio))
    except OutOfReach:
        raise OutOfReach(_out_of_reach(scores, budget, _least(tables, costs) / dense)) from None


def _least(tables: Tables, costs: Mapping[str, Array]) -> float:
    """The sum of the least costs that are allowed."""
    return sum(float(np.where(tables[name].allowed, cost, np.inf).min(-1).sum()) for name, cost in costs.items())


def _cheapest_error(tables: Tables, costs: Mapping[str, Array], limit: float) -> dict[str, Array]:
    """The choice with the least error whose costs are within the limit."""
    options = next(iter(costs.values())).shape[-1]
    error = np.concatenate([tables[name].error.reshape(-1, options) for name in costs])
    cost = np.concatenate([part.reshape(-1, options) for part in costs.values()])
    try:
        choice = knapsack(error, cost, limit)
    except ValueError as error:
        raise OutOfReach(str(error)) from None
    sizes = np.cumsum([table.error[..., 0].size for table in tables.values()])[:-1]
    return {
        name: part.reshape(tables[name].error.shape[:-1]) for name, part in zip(costs, np.split(choice, sizes))
    }


def _out_of_reach(scores: Scores, budget: Budget, least: float) -> str:
    if budget.kind == "density":
        return density_out_of_reach(budget, least)
    share = scores.attention_share
    most = faster(share, least)
    return (
        f"a speed-up of {budget.value:g} is out of reach: self-attention takes {share:.0%} of a generation here and the "
        f"fastest plan leaves {least:.0%} of that, so that {most:.2f} is the most; ask for less, or for fewer dense steps"
    )


def _summary(
    scores: Scores,
    tables: Tables,
    left: Tables,
    choice: dict[str, Array],
    steps: StepOptions | None = None,
    chosen: StepChoice | None = None,
) -> Assignment:
    """`tables` are those of all steps, `left` those of the steps that run."""

    def total(table: Array, chosen: Array) -> float:
        return float(np.take_along_axis(table, chosen[..., None], -1).sum())

    error = sum(total(left[name].plain_error, choice[name]) for name in choice)
    calls = sum(float(tables[name].calls.sum()) * scores.models[name].layers for name in choice)
    heads = sum(float(tables[name].density[..., DENSE].sum()) for name in choice)
    density = sum(total(left[name].density, choice[name]) for name in choice) / heads
    ratio = sum(total(left[name].time, choice[name]) for name in choice) / _dense(tables)
    share = scores.attention_share
    return Assignment(
        choice=choice,
        error=error / calls,
        density=density,
        attention_ratio=ratio,
        speedup=steps.speedup(share, ratio, chosen) if steps else faster(share, ratio),
        steps=chosen,
        heads_error=sum(total(left[name].error, choice[name]) for name in choice),
    )


def _span_weights(scores: Scores, weights: Sequence[float] | None) -> Array:
    given = scores.span_weights() if weights is None else np.asarray(weights, "f8")
    if given.shape != (len(scores.spans),) or not (np.isfinite(given).all() and (given > 0).all()):
        raise ValueError(f"span_weights: expected {len(scores.spans)} positive numbers, one per span, found {weights}")
    return given


def _open_spans(scores: Scores, dense_steps: float) -> Array:
    if not is_border(scores.spans, dense_steps):
        borders = [start for start, _ in scores.spans] + [1.0]
        raise ValueError(
            f"dense_steps must be a border of the probed spans {borders}, found {dense_steps}; probe again"
        )
    return np.array([is_open(span, dense_steps) for span in scores.spans])
