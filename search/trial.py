"""The first moments of a generation: enough to estimate a probe, and enough to time the candidates' kernels."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusers_accel.layout import TokenLayout
from diffusers_accel.search.cost import Cost, describe_device, launches, time_candidates
from diffusers_accel.search.probe import PassProbe
from diffusers_accel.search.running import Enough, SiteEngine, now
from diffusers_accel.search.scores import Scores
from diffusers_accel.site import DenseAttention, Engine, Site


@dataclass
class Trial:
    """What the first step of a generation tells.

    Args:
        layout: how the tokens lie.
        steps: of the schedule.
        measure_seconds: what measuring one attention call takes.
        step_seconds: what a dense step takes.
        calls: self-attention calls of a layer in a step, all branches together.
    """

    layout: TokenLayout
    steps: int
    measure_seconds: float
    step_seconds: float = 0.0
    calls: int = 0


class Stopwatch:
    """Measures one call with `make_probe`'s probe, then times the first step and stops the generation."""

    def __init__(self, make_probe: Callable[[TokenLayout], PassProbe]) -> None:
        self._make_probe = make_probe
        self._trial: Trial | None = None
        self._begin = 0.0

    def engine(self, site: Site) -> Engine:
        return SiteEngine(self, site)

    def attend(self, site: Site, q: Tensor, k: Tensor, v: Tensor, dense: DenseAttention) -> Tensor:
        step, steps = now(site)
        if self._trial is None:
            for _ in range(2):  # the first one warms up
                probe = self._make_probe(site.layout())
                probe.measure(site, 0, 0, q, k, v)
            self._trial = Trial(site.layout(), steps, probe.measuring_seconds)
            self._begin = time.perf_counter()
        elif step > 0:
            self._stop(q.device)
            raise Enough
        self._trial.calls += site.layer == 0
        return dense(q, k, v)

    def result(self) -> Trial:
        """What was seen; call it after the run."""
        if self._trial is None:
            raise RuntimeError("the pipeline never called a self-attention: there is nothing to search for")
        if not self._trial.step_seconds:  # a schedule of one step ran to its end
            self._trial.step_seconds = time.perf_counter() - self._begin
        return self._trial

    def _stop(self, device: torch.device) -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        assert self._trial is not None
        self._trial.step_seconds = time.perf_counter() - self._begin


class CostTimer:
    """Times the candidates on the first call's own q, k and v, with the user's own dense attention, and stops."""

    def __init__(self, scores: Scores, seconds: float, on_round: Callable[[float], None]) -> None:
        self._scores = scores
        self._seconds = seconds
        self._on_round = on_round
        self.cost: Cost | None = None

    def engine(self, site: Site) -> Engine:
        return SiteEngine(self, site)

    def attend(self, site: Site, q: Tensor, k: Tensor, v: Tensor, dense: DenseAttention) -> Tensor:
        models, name, shape = self._scores.models, site.transformer, site.model.shape
        if {(each.heads, each.head_dim) for each in models.values()} != {(shape.heads, shape.head_dim)}:
            raise ValueError(f"expected transformers of equal heads, whose kernels cost the same, found {models}")
        tensors = {f"stripe_mass/{name}": torch.from_numpy(self._scores.stripe_mass(name))}
        planned = launches(self._scores.candidates, site.layout(), name, shape, tensors, q.device)
        ms, rounds = time_candidates(planned, q, k, v, dense, self._seconds, self._on_round)
        times = {each: tuple(float(value) for value in ms) for each in models}
        self.cost = Cost(times, describe_device(q.device), q.shape[1], q.shape[0], rounds)
        raise Enough
