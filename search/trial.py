"""The first moments of a generation: enough to estimate a probe, and enough to time the candidates' kernels."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

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
from diffusers_accel.search.running import Enough, Schedules, SiteEngine, now
from diffusers_accel.search.scores import Array, Scores

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
    """Times the candidates on a call's own q, k and v, with the user's own dense attention, and stops: on the first call; where
    layers see other tokens, on one of each kind; where a video is made chunk by chunk, in the chunk that stands for all.

    Args:
        scores: of the candidates; `where` is their file.
        seconds, on_round: of `time_candidates`.
    """

    def __init__(self, scores: Scores, where: str, seconds: float, on_round: Callable[[float], None]) -> None:
        self._scores = scores
        self._where = where
        self._seconds = seconds
        self._on_round = on_round
        self._schedules = Schedules()
        self._kinds: tuple[TokenLayout, ...] = ()  # of each layer
        self._times: dict[TokenLayout, Array] = {}
        self._rounds: int | None = None
        self._sizes = ("", 0, 0)  # device, tokens and batch rows of the first call that was timed

    @property
    def cost(self) -> Cost:
        """What was timed; call it after the run."""
        if self._rounds is None:
            raise RuntimeError("the pipeline never called a self-attention, so that no candidate could be timed")
        distinct, ms, refresh_ms, kinds = [*dict.fromkeys(self._kinds)], {}, {}, {}
        for transformer in self._scores.models:
            names = [transformer, *(f"{transformer}, {number}" for number in range(1, len(distinct)))]
            for name, layout in zip(names, distinct, strict=True):
                ms[name], refresh_ms[name] = (tuple(column.tolist()) for column in self._times[layout].T)
            if len(distinct) > 1:
                kinds[transformer] = tuple(names[distinct.index(layout)] for layout in self._kinds)
        return Cost(ms, refresh_ms, *self._sizes, self._rounds, kinds)

    def engine(self, site: Site) -> Engine:
        return SiteEngine(self, site)

    def attend(self, site: Site, call: AttentionCall, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        assert call.dense is not None
        chunk = self._scores.runs[0].chunk
        if self._schedules.of(call) < chunk:
            return call.dense(q, k, v)
        if not self._kinds:
            self._begin(site, call, chunk)
        if call.layout in self._kinds and call.layout not in self._times:
            self._times[call.layout], rounds = self._time(call, q, k, v)
            if self._rounds is None:
                self._rounds, self._sizes = rounds, (describe_device(q.device), q.shape[1], q.shape[0])
        if {*self._kinds} <= {*self._times}:
            raise Enough
        return call.dense(q, k, v)

    def _begin(self, site: Site, call: AttentionCall, chunk: int) -> None:
        """At the first call of a layer: how the tokens lie in each of them."""
        models, shape = self._scores.models, site.model.shape
        if {(each.heads, each.head_dim) for each in models.values()} != {(shape.heads, shape.head_dim)}:
            raise ValueError(f"expected transformers of equal heads, whose kernels cost the same, found {models}")
        if not chunk:
            check_layout(self._scores, call.layout.whole, self._where)
        layout_in, config = site.model.family.layout_in, cast(Any, site.model.module).config
        self._kinds = tuple(
            layout_in(config, call.layout, layer) if layout_in else call.layout for layer in range(shape.layers)
        )

    def _time(self, call: AttentionCall, q: Tensor, k: Tensor, v: Tensor) -> tuple[Array, int]:
        """Of each candidate, ms of a usual call and of one that refreshes, [candidates, 2]; and how often they were timed."""
        name, candidates, place = call.transformer, self._scores.candidates, call.layout
        call, tensors = replace(call, layer=0, now=(0, 1)), self._tensors(name)
        wanted = [self._sampled(index, place) for index in range(len(candidates))]
        kinds = [alike(method) if use else None for method, use in zip(candidates, wanted)]
        distinct = [kind for kind in dict.fromkeys(kinds) if kind is not None]
        planned = [launch_all(method, call, tensors, q.device) for method in distinct]
        seconds = self._seconds / len({*self._kinds})
        times, rounds = time_candidates(planned, call, q, k, v, seconds, self._on_round)
        # What was never measured is never taken, and what reads all takes as long: it stands at the time of dense.
        return np.array([times[distinct.index(kind)] if kind else times[0] for kind in kinds]), rounds

    def _sampled(self, index: int, layout: TokenLayout) -> bool:
        """Whether a candidate was ever measured, and does not just read all of this layout; dense always counts."""
        method = self._scores.candidates[index]
        if index and method.select.needs_history and method.select.reads_all_in(method.order, layout):
            return False
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
