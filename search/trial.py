"""The first moments of a generation: enough to estimate a probe, and enough to time the candidates' kernels."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from diffusers_accel.layout import TokenLayout
from diffusers_accel.methods import Context, Stored
from diffusers_accel.search.cost import Cost, alike, describe_device, launch_all, time_candidates
from diffusers_accel.search.probe import PassProbe
from diffusers_accel.search.running import Enough, SiteEngine, now
from diffusers_accel.search.schedule import stored_densities
from diffusers_accel.search.scores import Scores
from diffusers_accel.search.stored_masks import stored_tensors
from diffusers_accel.site import DenseAttention, Engine, Site


@dataclass
class Trial:
    """What the first step of a generation tells.

    Args:
        layout: how the tokens lie, whole text.
        steps: of the schedule.
        measure_seconds: what measuring one attention call takes.
        calibrate_seconds: what choosing the stored masks of a layer takes; 0 without such candidates.
        step_seconds: what a dense step takes.
        calls: self-attention calls of a layer in a step, all branches together.
    """

    layout: TokenLayout
    steps: int
    measure_seconds: float
    calibrate_seconds: float
    step_seconds: float = 0.0
    calls: int = 0


class Stopwatch:
    """Measures one call with `make_probe`'s probe, then times the first step and stops the generation."""

    def __init__(self, make_probe: Callable[[TokenLayout, int], PassProbe]) -> None:
        self._make_probe = make_probe
        self._trial: Trial | None = None
        self._begin = 0.0

    def engine(self, site: Site) -> Engine:
        return SiteEngine(self, site)

    def attend(self, site: Site, q: Tensor, k: Tensor, v: Tensor, dense: DenseAttention) -> Tensor:
        step, steps = now(site)
        if self._trial is None:
            layout = replace(site.layout(), text_valid=None)
            for _ in range(2):  # the first one warms up
                probe = self._make_probe(layout, steps)
                probe.measure(site, 0, 0, q, k, v)
            measure = probe.measuring_seconds
            if probe.settings.stores:
                probe.calibrate(site, 0, q, k, v)
            self._trial = Trial(layout, steps, measure, probe.measuring_seconds - measure)
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
        ctx = Context(site.layout(), name, 0, tuple(range(shape.heads)), self._tensors(name), (0, 1))
        wanted = [self._sampled(name, index) for index in range(len(self._scores.candidates))]
        kinds = [alike(method) if use else None for method, use in zip(self._scores.candidates, wanted)]
        distinct = [kind for kind in dict.fromkeys(kinds) if kind is not None]
        planned = [launch_all(method, ctx, q.device) for method in distinct]
        times, rounds = time_candidates(planned, q, k, v, dense, self._seconds, self._on_round)
        # What was never measured is never taken: it stands at the time of dense.
        every = np.array([times[distinct.index(kind)] if kind else times[0] for kind in kinds])
        ms, refresh_ms = ({each: tuple(column.tolist()) for each in models} for column in every.T)
        self.cost = Cost(ms, refresh_ms, describe_device(q.device), q.shape[1], q.shape[0], rounds)
        raise Enough

    def _sampled(self, name: str, index: int) -> bool:
        """Whether a candidate was ever measured; dense always counts."""
        return index == 0 or any(self._scores.samples(each)[..., index].any() for each in self._scores.models)

    def _tensors(self, name: str) -> dict[str, Tensor]:
        """What the methods of `alike` read, for the first layer: masks of whatever order, as they cost the same."""
        scores = self._scores
        tensors = {f"stripe_mass/{name}": torch.from_numpy(scores.stripe_mass(name))}
        densities = stored_densities(scores.candidates)
        for method in {alike(method) for method in scores.candidates}:
            if isinstance(method.select, Stored):
                first = np.zeros((scores.models[name].layers, scores.models[name].heads), bool)
                first[0] = True
                names = method.select.names(method.order, name)
                tensors |= stored_tensors(scores.sums[f"levels/{name}"], method.select.density, densities, first, names)
        return tensors
