"""What every candidate costs and how wrong it is, for every head of a transformer: what an assignment chooses from."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from diffusers_accel.search.budget import Budget
from diffusers_accel.search.cost import Cost
from diffusers_accel.search.coverage import Coverage
from diffusers_accel.search.knapsack import cheapest
from diffusers_accel.search.scores import DENSE, Array, Scores


@dataclass(frozen=True)
class HeadTable:
    """Of one transformer, [spans, layers, heads, candidates], summed over the calls of a generation of which every step runs.

    Args:
        error: weighted errors, infinite where a candidate is not allowed.
        plain_error: errors as they were measured.
        time: in ms; the same for all heads of a layer.
        density: of blocks.
        allowed: whether a candidate may be taken.
        calls: [spans], calls of each layer.
    """

    error: Array
    plain_error: Array
    time: Array
    density: Array
    allowed: Array
    calls: Array

    @classmethod
    def build(cls, scores: Scores, cost: Cost, name: str, weights: Array, open_spans: Array, taken: Array) -> HeadTable:
        """Of the transformer `name`; `weights` [spans, layers], `open_spans` bool [spans], `taken` bool [candidates]."""
        measured = scores.samples(name) > 0
        allowed = measured & open_spans[:, None, None, None] & taken
        calls = scores.calls(name)
        allowed = allowed & (calls > 0)[:, None, None, None]
        allowed[..., DENSE] = True
        plain = np.where(measured, scores.error(name), 0.0) * calls[:, None, None, None]
        error = np.where(allowed, plain * weights[:, :, None, None], np.inf)
        error[..., DENSE] = 0.0
        ms, refresh_ms = cost.of_layers(name)
        if ms.shape[1] != len(scores.candidates):
            raise ValueError(
                f"the cost has {ms.shape[1]} candidates, the scores have {len(scores.candidates)}: measure the cost again"
            )
        mean_ms = ms + scores.refreshed(name)[:, None] * (refresh_ms - ms)  # [spans, layers or 1, candidates]
        time = np.broadcast_to((calls[:, None, None] * mean_ms)[:, :, None], measured.shape)
        density = calls[:, None, None, None] * np.where(measured, scores.density(name), 1.0)
        return cls(error, plain, time, density, allowed, calls)

    def under(self, coverage: Coverage, weights: Array) -> HeadTable:
        """What is left of it where only some steps run: less time, and errors that are made again in predicted steps.

        Args:
            weights: [spans, layers], by which `error` was weighted.
        """
        again = (coverage.covers @ weights) / weights
        computed = coverage.computed[:, None, None, None]
        possible = np.where(self.allowed, self.error, 0.0) * again[:, :, None, None]
        return HeadTable(
            np.where(self.allowed, possible, np.inf),
            self.plain_error * coverage.covers.sum(1)[:, None, None, None],
            self.time * computed,
            self.density * computed,
            self.allowed,
            self.calls,
        )

    def sparse_vdit(self, scores: Scores, name: str, budget: Budget) -> Array:
        """The choice of Sparse-vDiT's rule, int [spans, layers, heads]."""
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
