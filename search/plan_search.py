"""The search: probe -> scores -> cost -> assign -> plan, on the user's own loaded pipeline."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from diffusers_accel.families import find
from diffusers_accel.layout import TokenLayout
from diffusers_accel.methods import Method
from diffusers_accel.plan import Plan
from diffusers_accel.search.assign import assign
from diffusers_accel.search.budget import Budget
from diffusers_accel.search.candidates import candidates_for, check_candidates
from diffusers_accel.search.cost import Cost
from diffusers_accel.search.identity import check_same_search, configuration, versions
from diffusers_accel.search.plan_making import make_plan
from diffusers_accel.search.probe import PassProbe, measuring_bytes
from diffusers_accel.search.running import Prompt, check_call, check_callback, now, prompt_label, run_pipeline
from diffusers_accel.search.schedule import Schedule, Settings
from diffusers_accel.search.scores import Scores
from diffusers_accel.search.screen import Screen, clock
from diffusers_accel.search.sensitivity import Dense, LastLatents, impact, plan_engine, span_choice, summed_error
from diffusers_accel.search.trial import CostTimer, Stopwatch, Trial
from diffusers_accel.site import Engine, Site

SPANS = (0.1, 0.3, 0.6)  # borders: short spans first, where one step differs most from the next
ROWS = 256
COST_SECONDS = 10.0


def search_plan(
    pipe: Any,
    prompts: Sequence[Prompt],
    *,
    call: Mapping[str, Any],
    budget: Budget,
    candidates: Sequence[Method] | None = None,
    spans: Sequence[float] | None = None,
    dense_steps: float = 0.0,
    span_weights: Sequence[float] | None = None,
    seed: int = 0,
    rows: int = ROWS,
    probe_steps: int = 1,
    scores_path: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Plan:
    """Profiles each head on calibration prompts and returns the plan with the least error inside the budget.

    The pipeline is used as it is (LoRA, offload, quantisation, attention backend) and left as it was, also after Ctrl-C.

    Args:
        pipe: a loaded diffusers video pipeline.
        prompts: calibration prompts, one generation each; a mapping gives other arguments, such as prompt_embeds.
        call: all further arguments of `pipe(...)`: size, frames, steps, guidance. A plan is for this size and schedule.
        budget: `Budget.speedup(1.4)`, `Budget.density(0.3)` or `Budget.paper(epsilon, lam)`.
        candidates: methods to choose from, the first of them dense; None: `search.candidates.candidates_for(pipe)`. Stored
            masks among them are chosen on the first prompt and judged on the others, so that one prompt is too few for them.
        spans: inner borders of the stretches of the schedule that are decided separately, ascending in (0, 1); None:
            0.1, 0.3 and 0.6, and `dense_steps`.
        dense_steps: share of the schedule, from its start, that stays dense.
        span_weights: how much an error in each span matters; None: measured, by one more generation per span.
        seed: of the noise of prompt i (seed + i) and of the sampled rows.
        rows: sampled query rows per measured call.
        probe_steps: measured steps per span and prompt.
        scores_path: file (.safetensors) that keeps what was measured. If it exists, the search goes on from there: more
            prompts can be added, another budget costs seconds. The kernel times are kept beside it as .cost.json.
        progress: print the estimate and show progress on stderr.

    Raises:
        ValueError: an argument is wrong, the budget is out of reach, or `scores_path` holds another search's scores; the
            message says what to do.
    """
    prompts = tuple(prompts)
    check_call(call, prompts)
    edges = _borders(spans, dense_steps)
    chosen = check_candidates(candidates_for(pipe) if candidates is None else candidates)
    settings = Settings(chosen, edges, rows, probe_steps, seed)
    screen = Screen(progress)
    measures_spans = span_weights is None and budget.kind != "paper" and len(edges) > 1
    if measures_spans:
        check_callback(pipe)
    search = _Search(pipe, prompts, dict(call), settings, screen, measures_spans)
    path = None if scores_path is None else Path(scores_path)
    scores = search.probe(path)
    cost = search.cost(scores)
    if path is not None:
        cost.save(path.with_suffix(".cost.json"))
    if measures_spans:
        scores = search.spans(scores, path)
    assignment = assign(scores, cost, budget, dense_steps=dense_steps, span_weights=span_weights)
    screen.say(
        f"plan: expected {assignment.speedup:.2f}x, density {assignment.density:.2f}, "
        f"attention {assignment.attention_ratio:.0%} of dense, error {assignment.error:.2g}"
    )
    return make_plan(scores, cost, assignment, budget)


class _Search:
    """One search on one pipeline."""

    def __init__(
        self,
        pipe: Any,
        prompts: tuple[Prompt, ...],
        call: dict[str, Any],
        settings: Settings,
        screen: Screen,
        measures_spans: bool,
    ) -> None:
        self.pipe = pipe
        self.prompts = prompts
        self.call = call
        self.settings = settings
        self.screen = screen
        self.measures_spans = measures_spans
        self.reference: Tensor | None = None  # final latents of the first prompt, dense
        self.found = find(pipe)
        self.models = {name: family.shape(module) for name, (module, family) in self.found.items()}
        self.family = next(iter(self.found.values()))[1].name
        self.config = configuration(pipe, self.found, call, settings)

    def probe(self, path: Path | None) -> Scores:
        """The scores of all prompts; passes that `path` holds are not run again."""
        scores = Scores.load(path) if path is not None and path.exists() else None
        if scores is not None:
            labels = [prompt_label(prompt) for prompt in self.prompts]
            check_same_search(scores, str(path), self.config, self.models, self.settings, labels)
        done = len(scores.passes) if scores else 0
        if scores and done >= len(self.prompts):
            self.screen.say(f"probe: all {done} prompts were finished before, in {path}")
            return scores
        trial = self._trial()
        if scores is None:
            scores = self._empty(trial.layout, trial.steps)
        self._estimate(trial, done)
        if self.settings.stores and len(self.prompts) == 1:
            self.screen.say(
                "stored masks cannot be chosen: the first prompt makes them, it takes a second one to judge them"
            )
        left = range(done, len(self.prompts))
        with self.screen.bar("probe", trial.steps * len(left)) as advance:
            for number in left:
                scores = self._pass(scores, trial, number, partial(_advance, advance, trial.steps * (number - done)))
                if path is not None:
                    scores.save(path)
        return scores

    def cost(self, scores: Scores) -> Cost:
        """The time of every candidate on this pipeline's device, at its shape, with its attention backend."""
        with self.screen.bar("cost", 100) as advance:
            timer = CostTimer(scores, COST_SECONDS, lambda share: advance(int(100 * share)))
            run_pipeline(self.pipe, timer.engine, self.prompts[0], self.call, self.settings.seed)
        assert timer.cost is not None, "the probe has seen self-attention, so the same call has it too"
        return timer.cost

    def spans(self, scores: Scores, path: Path | None) -> Scores:
        """The scores with the impact of every span; those that `path` holds are not measured again."""
        first = len(scores.impacts)
        if first == len(scores.spans):
            return scores
        with self.screen.bar("spans", 100 * (len(scores.spans) - first)) as advance:
            for span in range(first, len(scores.spans)):
                value = self._impact(scores, span, partial(_advance, advance, 100 * (span - first)))
                scores = replace(scores, impacts=(*scores.impacts, value))
                if path is not None:
                    scores.save(path)
        return scores

    def _impact(self, scores: Scores, span: int, on_percent: Callable[[int], None]) -> float:
        choice = span_choice(scores, span)
        if not summed_error(scores, choice):
            return 1.0  # no call falls into this span
        if self.reference is None:
            self.reference = self._latents(lambda site: Dense(), lambda percent: None)
        return impact(scores, choice, self._latents(plan_engine(scores, choice), on_percent), self.reference)

    def _latents(self, make_engine: Callable[[Site], Engine], on_percent: Callable[[int], None]) -> Tensor:
        """Final latents of the first prompt."""
        last = LastLatents(stop=True, on_share=lambda share: on_percent(int(100 * share)))
        run_pipeline(self.pipe, make_engine, self.prompts[0], self.call, self.settings.seed, last)
        assert last.latents is not None
        return last.latents

    def _pass(self, scores: Scores, trial: Trial, number: int, on_step: Callable[[int], None]) -> Scores:
        probe = PassProbe(
            self.settings,
            self.models,
            trial.layout,
            trial.steps,
            scores.sums,
            number,
            lambda site: on_step(now(site)[0]),
        )
        begin = time.perf_counter()
        last = LastLatents(stop=False) if self.measures_spans and number == 0 else None
        run_pipeline(self.pipe, probe.engine, self.prompts[number], self.call, self.settings.seed + number, last)
        seconds = time.perf_counter() - begin
        if last is not None:
            self.reference = last.latents
        on_step(trial.steps)
        return scores.plus(probe.finished(prompt_label(self.prompts[number]), seconds), probe.sums)

    def _trial(self) -> Trial:
        def make_probe(layout: TokenLayout, steps: int) -> PassProbe:
            return PassProbe(self.settings, self.models, layout, steps, self._empty(layout, steps).sums, 0)

        stopwatch = Stopwatch(make_probe)
        run_pipeline(self.pipe, stopwatch.engine, self.prompts[0], self.call, self.settings.seed)
        return stopwatch.result()

    def _empty(self, layout: TokenLayout, steps: int) -> Scores:
        methods, spans = self.settings.candidates, self.settings.spans
        parts = len(Schedule.of(self.settings, steps).parts)
        return Scores(
            family=self.family,
            models=self.models,
            layout=layout,
            candidates=methods,
            spans=spans,
            parts=parts,
            config=self.config,
            provenance=versions(self.pipe, layout),
            passes=(),
            sums=Scores.zeros(self.models, len(spans), methods, layout, parts),
        )

    def _estimate(self, trial: Trial, done: int) -> None:
        schedule = Schedule.of(self.settings, trial.steps)
        layers = max(model.layers for model in self.models.values())
        passes = len(self.prompts) - done
        generation = trial.steps * trial.step_seconds
        per_pass = generation + schedule.observed * trial.calls * layers * trial.measure_seconds
        # At most: the orders, which the trial has chosen too, are chosen only once.
        masks = len(schedule.parts) * layers * trial.calibrate_seconds if done == 0 else 0.0
        spans = len(self.settings.spans) * generation if self.measures_spans else 0.0
        model = next(iter(self.models.values()))
        memory = measuring_bytes(trial.layout.tokens, model, self.settings)
        self.screen.say(
            f"search: {trial.layout.tokens:,} tokens, {len(self.settings.candidates)} candidates; {done} of {len(self.prompts)} "
            f"prompts finished before; about {clock(passes * per_pass + masks + spans + 1.5 * COST_SECONDS)} to go, "
            f"and {memory / 2**20:,.0f} MiB beside the pipeline's own memory"
        )


def _advance(advance: Callable[[int], None], before: int, step: int) -> None:
    advance(before + step)


def _borders(spans: Sequence[float] | None, dense_steps: float) -> tuple[tuple[float, float], ...]:
    if not 0 <= dense_steps <= 1:
        raise ValueError(f"dense_steps is a share of the schedule, expected in [0, 1], found {dense_steps}")
    inner = sorted({*SPANS, dense_steps} - {0.0, 1.0}) if spans is None else [float(border) for border in spans]
    if any(not 0 < border < 1 for border in inner) or sorted(set(inner)) != inner:
        raise ValueError(f"spans are inner borders of the schedule, ascending in (0, 1), found {spans}")
    edges = [0.0, *inner, 1.0]
    return tuple(zip(edges, edges[1:]))
