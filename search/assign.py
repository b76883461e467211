"""Which candidate each head takes: pure, deterministic, numpy only, seconds on a CPU for any model.

A speed-up or a density is a limit on the sum of costs over all heads and calls, under which the sum of errors is minimised
(`search.knapsack`).

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
from diffusers_accel.search.knapsack import cheapest, knapsack
from diffusers_accel.search.schedule import is_border, is_open
from diffusers_accel.search.scores import DENSE, Array, Scores

SHARE_MARGIN = 0.1  # by so much attention's measured share is raised before a budget is refused before its time


class OutOfReach(ValueError):
    """No plan keeps the budget; the message says what can be reached."""


@dataclass(frozen=True)
class Assignment:
    """The choice for every head and what it is expected to do.

    Args:
        choice: per transformer, int [spans, layers, heads]: index of the candidate.
        error: mean over calls and layers of the layer's relative squared output error, as the probe predicts it.
        density: mean density of the whole run, 0..1.
        attention_ratio: attention time of the plan / dense attention time.
        speedup: expected factor for a whole generation.
    """

    choice: dict[str, Array]
    error: float
    density: float
    attention_ratio: float
    speedup: float


def assign(
    scores: Scores,
    cost: Cost,
    budget: Budget,
    *,
    dense_steps: float = 0.0,
    span_weights: Sequence[float] | None = None,
    among: Collection[Method] | None = None,
) -> Assignment:
    """The assignment with the least error inside the budget.

    Args:
        scores: what the probe measured.
        cost: time of each candidate per head, on the device of use.
        budget: see `Budget`.
        dense_steps: share of the schedule, from its start, that stays dense; must be a border of a span.
        span_weights: how much an error in each span matters, beside its number of calls, in whichever layer; None: as the scores
            measured it, for each span and layer.
        among: the candidates that may be taken beside dense; None: all.

    Raises:
        OutOfReach: no plan keeps the budget.
        ValueError: an argument does not fit.
    """
    if not scores.runs:
        raise ValueError("the scores hold no finished calibration run: probe at least one prompt first")
    weights = _weights(scores, span_weights)
    open_spans = _open_spans(scores, dense_steps)
    taken = np.array(
        [among is None or index == DENSE or method in among for index, method in enumerate(scores.candidates)]
    )
    tables = {name: _Table.build(scores, cost, name, weights[name], open_spans, taken) for name in scores.models}
    if budget.kind == "sparse_vdit":
        choice = {name: table.sparse_vdit(scores, name, budget) for name, table in tables.items()}
    else:
        choice = _within(budget, scores, tables)
    return _summary(scores, tables, choice)


def check_reach(budget: Budget, share: float, open_share: float, of: str) -> None:
    """Refuses a budget that no plan can keep, as far as that is clear before any candidate was timed or measured.

    Sparse attention that took no time at all would make a generation 1 / (1 - share x open share) times as fast. The share
    is one measurement of a noisy machine, so it is raised by `SHARE_MARGIN` of itself first: what is refused would have to be
    that far off.

    Args:
        share: attention's share of the time of `of`, 0..1; of a step, without what comes before and after the steps, it is an
            upper bound for that of a generation.
        open_share: share of the steps at which heads may be sparse, 0..1.
        of: "a step" or "a generation", for the message.

    Raises:
        OutOfReach: see above.
    """
    if budget.kind == "density" and budget.value < 1 - open_share - 1e-9:
        raise OutOfReach(_density_out_of_reach(budget, 1 - open_share))
    if budget.kind == "speedup" and budget.value > largest_speedup((1 + SHARE_MARGIN) * share, open_share):
        most = largest_speedup(share, open_share)
        stays = f" and {1 - open_share:.0%} of the steps stay dense" if open_share < 1 else ""
        raise OutOfReach(
            f"a speed-up of {budget.value:g} is out of reach: self-attention takes {share:.0%} of {of} here{stays}, so that "
            f"{most:.2f} is the most even if it took no time at all; ask for less{', or for fewer dense steps' if stays else ''}"
        )


def largest_speedup(share: float, open_share: float) -> float:
    """Of a generation of which attention takes `share`, if at `open_share` of the steps it took no time."""
    return _faster(share, 1 - open_share)


def _faster(share: float, ratio: float) -> float:
    """How many times as fast a generation is of which attention takes `share`, if that takes `ratio` of its time."""
    share = min(share, 1.0)
    left = 1 - share + share * ratio
    return 1 / left if left > 0 else float("inf")


@dataclass(frozen=True)
class _Table:
    """Of one transformer, [spans, layers, heads, candidates]: weighted errors (infinite where not allowed), ms, density."""

    error: Array
    plain_error: Array
    time: Array
    density: Array
    allowed: Array
    calls: Array

    @classmethod
    def build(cls, scores: Scores, cost: Cost, name: str, weights: Array, open_spans: Array, taken: Array) -> _Table:
        measured = scores.samples(name) > 0
        allowed = measured & open_spans[:, None, None, None] & taken
        calls = scores.calls(name)
        allowed = allowed & (calls > 0)[:, None, None, None]
        allowed[..., DENSE] = True
        plain = np.where(measured, scores.error(name), 0.0) * calls[:, None, None, None]
        error = np.where(allowed, plain * weights[:, :, None, None], np.inf)
        error[..., DENSE] = 0.0
        ms, refresh_ms = np.asarray(cost.ms[name]), np.asarray(cost.refresh_ms[name])
        if len(ms) != len(scores.candidates):
            raise ValueError(
                f"the cost has {len(ms)} candidates, the scores have {len(scores.candidates)}: measure the cost again"
            )
        mean_ms = ms + scores.refreshed(name) * (refresh_ms - ms)  # [spans, candidates]
        time = np.broadcast_to((calls[:, None] * mean_ms)[:, None, None], measured.shape)
        density = calls[:, None, None, None] * np.where(measured, scores.density(name), 1.0)
        return cls(error, plain, time, density, allowed, calls)

    def sparse_vdit(self, scores: Scores, name: str, budget: Budget) -> Array:
        mse = np.nan_to_num(scores.mse(name))
        if budget.mse == "relative":
            energy = np.nan_to_num(scores.energy(name))[..., None]
            mse = np.divide(mse, energy, out=np.zeros_like(mse), where=energy > 0)
        kept = self.density if budget.cost == "blocks" else self.time
        kept = np.divide(kept, kept[..., :1], out=np.ones_like(kept), where=kept[..., :1] > 0)  # 1 - S_i
        loss = np.where(self.allowed, mse + budget.penalty * kept, np.inf)
        loss[..., DENSE] = np.inf
        flat, tie = loss.reshape(-1, loss.shape[-1]), kept.reshape(-1, loss.shape[-1])
        best = cheapest(flat, tie)
        lowest = flat[np.arange(len(flat)), best]
        return np.where(np.isfinite(lowest) & (lowest < budget.value), best, DENSE).reshape(loss.shape[:-1])


def _within(budget: Budget, scores: Scores, tables: Mapping[str, _Table]) -> dict[str, Array]:
    names = list(tables)
    options = len(scores.candidates)
    error = np.concatenate([tables[name].error.reshape(-1, options) for name in names])
    costs = [tables[name].time if budget.kind == "speedup" else tables[name].density for name in names]
    cost = np.concatenate([part.reshape(-1, options) for part in costs])
    dense = float(cost[:, DENSE].sum())
    limit = dense * (budget.value if budget.kind == "density" else _attention_ratio(scores, budget.value))
    try:
        choice = knapsack(error, cost, limit)
    except ValueError:
        least = float(np.where(np.isfinite(error), cost, np.inf).min(1).sum()) / dense
        raise OutOfReach(_out_of_reach(scores, budget, least)) from None
    sizes = np.cumsum([tables[name].error[..., 0].size for name in names])[:-1]
    return {name: part.reshape(tables[name].error.shape[:-1]) for name, part in zip(names, np.split(choice, sizes))}


def _attention_ratio(scores: Scores, speedup: float) -> float:
    """The share of dense attention's time that may be left for a whole generation to be `speedup` times as fast."""
    share = scores.attention_share
    return 1 - (1 - 1 / speedup) / share


def _out_of_reach(scores: Scores, budget: Budget, least: float) -> str:
    if budget.kind == "density":
        return _density_out_of_reach(budget, least)
    share = scores.attention_share
    most = _faster(share, least)
    return (
        f"a speed-up of {budget.value:g} is out of reach: self-attention takes {share:.0%} of a generation here and the "
        f"fastest plan leaves {least:.0%} of that, so that {most:.2f} is the most; ask for less, or for fewer dense steps"
    )


def _density_out_of_reach(budget: Budget, least: float) -> str:
    found = f"the sparsest plan has {least:.3f}"
    return f"a density of {budget.value:g} is out of reach: {found}; allow more, or fewer dense steps"


def _summary(scores: Scores, tables: Mapping[str, _Table], choice: dict[str, Array]) -> Assignment:
    def total(table: Array, chosen: Array) -> float:
        return float(np.take_along_axis(table, chosen[..., None], -1).sum())

    error = sum(total(tables[name].plain_error, choice[name]) for name in choice)
    calls = sum(float(tables[name].calls.sum()) * scores.models[name].layers for name in choice)
    heads = sum(float(tables[name].density[..., DENSE].sum()) for name in choice)
    density = sum(total(tables[name].density, choice[name]) for name in choice) / heads
    dense_time = sum(float(tables[name].time[..., DENSE].sum()) for name in choice)
    ratio = sum(total(tables[name].time, choice[name]) for name in choice) / dense_time
    share = scores.attention_share
    return Assignment(choice, error / calls, density, ratio, _faster(share, ratio))


def _weights(scores: Scores, span_weights: Sequence[float] | None) -> dict[str, Array]:
    """Per transformer [spans, layers]."""
    if span_weights is None:
        return {name: scores.weights(name) for name in scores.models}
    given = np.asarray(span_weights, "f8")
    if given.shape != (len(scores.spans),) or not (np.isfinite(given).all() and (given > 0).all()):
        raise ValueError(
            f"span_weights: expected {len(scores.spans)} positive numbers, one per span, found {span_weights}"
        )
    return {name: np.repeat(given[:, None], model.layers, 1) for name, model in scores.models.items()}


def _open_spans(scores: Scores, dense_steps: float) -> Array:
    if not is_border(scores.spans, dense_steps):
        borders = [start for start, _ in scores.spans] + [1.0]
        raise ValueError(
            f"dense_steps must be a border of the probed spans {borders}, found {dense_steps}; probe again"
        )
    return np.array([is_open(span, dense_steps) for span in scores.spans])
