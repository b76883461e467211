"""A choice for every head and of the steps that run, and what it is expected to do."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from diffusers_accel.methods import Method
from diffusers_accel.search.cost import Cost
from diffusers_accel.search.exact import improved
from diffusers_accel.search.knapsack import bound_and_price, knapsack
from diffusers_accel.search.reach import OutOfReach, faster
from diffusers_accel.search.schedule import is_border, is_open
from diffusers_accel.search.scores import DENSE, Array, Scores
from diffusers_accel.search.step_options import StepOptions
from diffusers_accel.search.steps.choice import StepChoice
from diffusers_accel.search.tables import HeadTable

PROVEN = 1e-6  # a gap that is told from none

Tables = Mapping[str, HeadTable]


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
        bound: nothing that could have been chosen has a smaller `total()`; None: not known, as of the paper's rule.
    """

    choice: dict[str, Array]
    error: float
    density: float
    attention_ratio: float
    speedup: float
    steps: StepChoice | None = None
    heads_error: float = 0.0
    bound: float | None = None

    @property
    def gap(self) -> float | None:
        """By which share the error may be above the least possible one, 0 or more; None: not known."""
        if self.bound is None:
            return None
        return max(0.0, 1 - self.bound / self.total()) if self.total() > 0 else 0.0

    def total(self, correction: Correction = NO_CORRECTION) -> float:
        """The expected error of both scopes together."""
        predicted = self.steps.error if self.steps else 0.0
        return correction.heads * self.heads_error + correction.forwards * predicted


def gap_words(gap: float | None) -> str:
    """How far a choice may be from the best one, as the end of a line; "" where that is not known."""
    if gap is None:
        return ""
    return ", the best choice" if gap <= PROVEN else f", its choice within {max(gap, 1e-4):.2%} of the best one"


def build_tables(
    scores: Scores, cost: Cost, weights: Mapping[str, Array], dense_steps: float, among: Collection[Method] | None
) -> dict[str, HeadTable]:
    """The tables of all transformers; see `assign`."""
    if not scores.runs:
        raise ValueError("the scores hold no finished calibration run: probe at least one prompt first")
    open_spans = _open_spans(scores, dense_steps)
    taken = np.array(
        [among is None or index == DENSE or method in among for index, method in enumerate(scores.candidates)]
    )
    return {name: HeadTable.build(scores, cost, name, weights[name], open_spans, taken) for name in scores.models}


def dense_time(tables: Tables) -> float:
    """Time of dense attention in a generation of which every step runs."""
    return sum(float(table.time[..., DENSE].sum()) for table in tables.values())


def least_cost(tables: Tables, costs: Mapping[str, Array]) -> float:
    """The sum of the least costs that are allowed."""
    return sum(float(np.where(tables[name].allowed, cost, np.inf).min(-1).sum()) for name, cost in costs.items())


def least_error(
    tables: Tables, costs: Mapping[str, Array], limit: float, exact: bool = False
) -> tuple[dict[str, Array], float]:
    """The choice with (nearly) the least error whose costs are within the limit, and what no choice falls below.

    Args:
        exact: solve it as an integer program.
    """
    options = next(iter(costs.values())).shape[-1]
    error = np.concatenate([tables[name].error.reshape(-1, options) for name in costs])
    cost = np.concatenate([part.reshape(-1, options) for part in costs.values()])
    try:
        choice = knapsack(error, cost, limit)
        bound, _ = bound_and_price(error, cost, limit)
    except ValueError as reason:
        raise OutOfReach(str(reason)) from None
    if exact:
        choice, bound = improved(error, cost, limit, choice)
    sizes = np.cumsum([table.error[..., 0].size for table in tables.values()])[:-1]
    parts = zip(costs, np.split(choice, sizes))
    return {name: part.reshape(tables[name].error.shape[:-1]) for name, part in parts}, bound


def summary(
    scores: Scores,
    tables: Tables,
    left: Tables,
    choice: dict[str, Array],
    steps: StepOptions | None = None,
    chosen: StepChoice | None = None,
    bound: float | None = None,
) -> Assignment:
    """What a choice does. `tables` are those of all steps, `left` those of the steps that run; `bound` is that of the heads."""

    def total(table: Array, chosen: Array) -> float:
        return float(np.take_along_axis(table, chosen[..., None], -1).sum())

    error = sum(total(left[name].plain_error, choice[name]) for name in choice)
    calls = sum(float(tables[name].calls.sum()) * scores.models[name].layers for name in choice)
    heads = sum(float(tables[name].density[..., DENSE].sum()) for name in choice)
    density = sum(total(left[name].density, choice[name]) for name in choice) / heads
    ratio = sum(total(left[name].time, choice[name]) for name in choice) / dense_time(tables)
    share = scores.attention_share
    return Assignment(
        choice=choice,
        error=error / calls,
        density=density,
        attention_ratio=ratio,
        speedup=steps.speedup(share, ratio, chosen) if steps else faster(share, ratio),
        steps=chosen,
        heads_error=sum(total(left[name].error, choice[name]) for name in choice),
        bound=None if bound is None else bound + (chosen.error if chosen else 0.0),
    )


def find_weights(scores: Scores, span_weights: Sequence[float] | None) -> dict[str, Array]:
    """Per transformer [spans, layers], checked; None: as the scores measured them."""
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
