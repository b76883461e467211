"""The first moments of a generation: enough to estimate a probe, and enough to time the candidates' kernels."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from diffusers_accel.attach.site import Engine, Site, Timer
from diffusers_accel.call import AttentionCall
from diffusers_accel.layout import TokenLayout
from diffusers_accel.search.cost import Cost, alike, describe_device, launch_all, time_candidates
from diffusers_accel.search.identity import check_layout
from diffusers_accel.search.probe import RunProbe
from diffusers_accel.search.recorders import RECORDERS
from diffusers_accel.search.running import Enough, SiteEngine, now
from diffusers_accel.search.scores import Scores

MOST_STEPS = 3  # that are timed


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
        attention_share: of a step's time; of several timed steps the largest.
    """

    layout: TokenLayout
    steps: int
    measure_seconds: float
    calibrate_seconds: float
    step_seconds: float = 0.0
    calls: int = 0
    attention_share: float = 0.0


class Stopwatch:
    """Measures one call with `make_probe`'s probe, then times the first step and stops the generation.

    Args:
        make_probe: for a layout and a number of steps.
        doubt: whether a trial gives reason to time one more step, up to `MOST_STEPS`: the first one may hold what happens once,
            such as compiling, which makes attention's share look small.
    """

    def __init__(
        self,
        make_probe: Callable[[TokenLayout, int], RunProbe],
        doubt: Callable[[Trial], bool] = lambda trial: False,
    ) -> None:
        self._make_probe = make_probe
        self._doubt = doubt
        self._trial: Trial | None = None
        self._step = self._timed = 0  # the one that is being timed; how many were
        self._begin = 0.0
        self._timer = Timer()

    def engine(self, site: Site) -> Engine:
        return SiteEngine(self, site)

    def attend(self, site: Site, call: AttentionCall, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        step, steps = now(call)
        if self._trial is None:
            layout = call.layout.whole
            for _ in range(2):  # the first one warms up
                probe = self._make_probe(layout, steps)
                probe.measure(site, replace(call, now=(0, steps)), 0, q, k, v)
            measure = probe.measuring_seconds
            if probe.settings.in_segments:
                probe.calibrate(call, 0, q, k, v)
            self._trial = Trial(layout, steps, measure, probe.measuring_seconds - measure)
            self._start(step)
        elif step != self._step:
            self._finish(self._trial, q.device)
            if self._timed == MOST_STEPS or not self._doubt(self._trial):
                raise Enough
            self._start(step)
        self._trial.calls += call.layer == 0 and self._timed == 0
        assert call.dense is not None
        with self._timer.running(q.device):
            return call.dense(q, k, v)

    def result(self) -> Trial:
        """What was seen; call it after the run."""
        if self._trial is None:
            raise RuntimeError("the pipeline never called a self-attention: there is nothing to search for")
        if not self._timed:  # a schedule of one step ran to its end
            self._finish(self._trial, torch.device("cpu"))
        return self._trial

    def _start(self, step: int) -> None:
        self._step = step
        self._timer = Timer()
        self._begin = time.perf_counter()

    def _finish(self, trial: Trial, device: torch.device) -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - self._begin
        trial.step_seconds = min(seconds, trial.step_seconds) if self._timed else seconds
        trial.attention_share = max(trial.attention_share, self._timer.attention_ms / 1e3 / seconds)
        self._timed += 1


class CostTimer:
    """Times the candidates on the first call's own q, k and v, with the user's own dense attention, and stops.

    Args:
        scores: of the candidates; `where` is their file.
        seconds, on_round: of `time_candidates`.
    """

    def __init__(self, scores: Scores, where: str, seconds: float, on_round: Callable[[float], None]) -> None:
        self._scores = scores
        self._where = where
        self._seconds = seconds
        self._on_round = on_round
        self._cost: Cost | None = None

    @property
    def cost(self) -> Cost:
        """What was timed; call it after the run."""
        if self._cost is None:
            raise RuntimeError("the pipeline never called a self-attention, so that no candidate could be timed")
        return self._cost

    def engine(self, site: Site) -> Engine:
        return SiteEngine(self, site)

    def attend(self, site: Site, call: AttentionCall, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        models, name, shape = self._scores.models, site.transformer, site.model.shape
        if {(each.heads, each.head_dim) for each in models.values()} != {(shape.heads, shape.head_dim)}:
            raise ValueError(f"expected transformers of equal heads, whose kernels cost the same, found {models}")
        check_layout(self._scores, call.layout.whole, self._where)
        call, tensors = replace(call, layer=0, now=(0, 1)), self._tensors(name)
        wanted = [self._sampled(name, index) for index in range(len(self._scores.candidates))]
        kinds = [alike(method) if use else None for method, use in zip(self._scores.candidates, wanted)]
        distinct = [kind for kind in dict.fromkeys(kinds) if kind is not None]
        planned = [launch_all(method, call, tensors, q.device) for method in distinct]
        times, rounds = time_candidates(planned, call, q, k, v, self._seconds, self._on_round)
        # What was never measured is never taken: it stands at the time of dense.
        every = np.array([times[distinct.index(kind)] if kind else times[0] for kind in kinds])
        ms, refresh_ms = ({each: tuple(column.tolist()) for each in models} for column in every.T)
        self._cost = Cost(ms, refresh_ms, describe_device(q.device), q.shape[1], q.shape[0], rounds)
        raise Enough

    def _sampled(self, name: str, index: int) -> bool:
        """Whether a candidate was ever measured; dense always counts."""
        return index == 0 or any(self._scores.samples(each)[..., index].any() for each in self._scores.models)

    def _tensors(self, name: str) -> dict[str, Tensor]:
        """What the methods of `alike` read, for the first layer: masks of whatever order, as they cost the same."""
        scores = self._scores
        first = np.zeros((scores.models[name].layers, scores.models[name].heads), bool)
        first[0] = True
        tensors: dict[str, Tensor] = {}
        for method in {alike(method) for method in scores.candidates}:
            if method.select.records:
                recorder = RECORDERS[method.select.records]
                tensors |= recorder.tensors(scores.candidates, scores.sums, name, method, first)
        return tensors
