"""The search: probe -> scores -> cost -> assign -> plan, on the user's own loaded pipeline."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffusers_accel.attach.site import Engine, Site
from diffusers_accel.files import only_writer, quoted
from diffusers_accel.layout import TokenLayout
from diffusers_accel.methods import Method
from diffusers_accel.plan import Plan
from diffusers_accel.search.arguments import (
    borders,
    check_budget,
    check_call,
    check_callback,
    check_pipeline,
    check_prompts,
    check_searchable,
    check_weights,
    dense_share,
    makes_chunks,
)
from diffusers_accel.search.assign import assign
from diffusers_accel.search.assignment import Assignment, gap_words
from diffusers_accel.search.budget import Budget
from diffusers_accel.search.candidates import candidates_for, check_candidates
from diffusers_accel.search.checks import whole_number
from diffusers_accel.search.cost import Cost
from diffusers_accel.search.exact import check_solver
from diffusers_accel.search.identity import (
    Found,
    check_layout,
    check_same_search,
    configuration,
    environment,
    versions,
)
from diffusers_accel.search.keeping import Keeper, cached_scores, check_places, cost_file, steps_file
from diffusers_accel.search.last_latents import Ending, LastLatents
from diffusers_accel.search.layer_gains import LayerGains
from diffusers_accel.search.predicted import layer_errors
from diffusers_accel.search.probe import RunProbe, measuring_bytes
from diffusers_accel.search.profile import Profile
from diffusers_accel.search.reach import OutOfReach, check_reach
from diffusers_accel.search.running import Prompt, now, prompt_label, run_pipeline
from diffusers_accel.search.schedule import ProbeSchedule, ProbeSettings, open_share
from diffusers_accel.search.scores import Array, CalibrationRun, Scores
from diffusers_accel.search.screen import Screen
from diffusers_accel.search.sensitivity import Dense, drift, impacts, layer_choice, plan_engine, span_choice
from diffusers_accel.search.step_options import PROMPTS, StepOptions, measure_steps
from diffusers_accel.search.steps.measured import MeasuredSteps
from diffusers_accel.search.steps_alone import StepsAlone
from diffusers_accel.search.stored_masks import USUAL_MASKS, MaskSettings
from diffusers_accel.search.trial import CostTimer, Stopwatch, Trial
from diffusers_accel.support.interrupted import Interrupted
from diffusers_accel.support.processes import Processes, processes
from diffusers_accel.support.progress import clock

ROWS = 256
COST_SECONDS = 10.0
MOST_ALONE = 6  # choices of steps that are run alone
GO_ON = "Call search_plan again with the same arguments and it goes on from there"


def search_plan(
    pipe: Any,
    prompts: Sequence[Prompt],
    *,
    call: Mapping[str, Any],
    budget: Budget,
    out: str | os.PathLike[str] | None = None,
    candidates: Sequence[Method] | None = None,
    spans: Sequence[float] | None = None,
    dense_steps: float = 0.0,
    span_weights: Sequence[float] | None = None,
    correct: bool = False,
    seed: int = 0,
    rows: int = ROWS,
    probe_steps: int = 1,
    masks: MaskSettings = USUAL_MASKS,
    step_caches: bool = True,
    exact: bool = False,
    scores_path: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Plan:
    """Profiles each head on calibration prompts and returns the plan with the least error inside the budget.

    For a speed-up the budget is one over both scopes: how many steps are computed, which, how the others are predicted, and what
    each head does in those that are.

    The pipeline is used as it is (LoRA, offload, quantisation, attention backend) and left as it was, also after Ctrl-C.
    What is measured is kept in a file after each prompt, and the same search goes on from there.

    Where torch.distributed is initialised, as under `accelerate launch`, all its processes make the same call, each with the
    whole pipeline on a device of its own. Prompts and spans are dealt over them; all get the plan of one process. The first one
    alone writes files and shows progress. One that fails ends the search in all of them.

    Args:
        pipe: a loaded diffusers video pipeline.
        prompts: calibration prompts, one generation each; a mapping gives other arguments, such as prompt_embeds.
        call: all further arguments of `pipe(...)`: size, frames, steps, guidance. A plan is for this size and schedule.
        budget: `Budget.speedup(1.4)`, `Budget.density(0.3)` or `Budget.sparse_vdit(epsilon, lam)`.
        out: the plan file (.json) to write; that it can be written is made sure before the work.
        candidates: methods to choose from, the first of them dense; None: `search.candidates.candidates_for(pipe)`. Stored
            masks among them are chosen on the first prompt and judged on the others, so that one prompt is too few for them.
        spans: inner borders of the stretches of the schedule that are decided separately, ascending in (0, 1); None:
            0.1, 0.3 and 0.6, and `dense_steps`.
        dense_steps: what stays dense at the start of the schedule: a share of it, a float in [0, 1]; or a count of the steps of
            `call`, a whole number of 1 or more.
        span_weights: how much an error in each span matters, in whichever layer; None: measured for each span and layer, by one
            more generation per span and one more forward per span, layer and branch.
        correct: the plan subtracts each head's mean error, see docs/search.md. What is expected of it is so without that.
        seed: of the noise of prompt i (seed + i) and of the sampled rows.
        rows: sampled query rows per measured call.
        probe_steps: measured steps per span and prompt.
        masks: how the orders and blocks of stored masks are chosen.
        step_caches: for a speed-up, also choose which steps are computed; takes one more generation of each of the first
            `step_options.PROMPTS` prompts, and measured spans (no `span_weights`). False, and where a video is made chunk by
            chunk: every step is.
        exact: solve the assignment as an integer program, with scipy, instead of at most one head away from the optimum.
        scores_path: file (.safetensors) that keeps what was measured, for this search alone while it runs; None: beside `out`,
            else in the user's cache. If it exists, the search goes on from there: more prompts can be added, another budget
            costs seconds. The kernel times are kept beside it as .cost.json.
        progress: print the estimate and show progress on stderr.

    Returns:
        The plan. What speaks against its use (it is slower than dense, it ruins the result) is said on the screen, or in the
        log without `progress`, and stands in `provenance["warnings"]`.

    Raises:
        TypeError, ValueError: an argument is wrong, or `scores_path` holds another search's scores, or another search measures
            into it; before anything runs.
        OSError: a file cannot be written; before anything runs, where that shows by then.
        OutOfReach: a ValueError, no plan keeps the budget; as soon as that is clear.
        OtherProcessFailed: a RuntimeError, in the processes beside the one that failed.
        Interrupted: a KeyboardInterrupt, which says what is kept.
    """
    check_budget(budget)
    _, plan = _search(
        pipe,
        prompts,
        call=call,
        budget=budget,
        out=out,
        candidates=candidates,
        spans=spans,
        dense_steps=dense_steps,
        span_weights=span_weights,
        seed=seed,
        rows=rows,
        probe_steps=probe_steps,
        masks=masks,
        step_caches=step_caches,
        correct=correct,
        exact=exact,
        scores_path=scores_path,
        progress=progress,
    )
    assert plan is not None
    return plan


def search_profile(
    pipe: Any,
    prompts: Sequence[Prompt],
    *,
    call: Mapping[str, Any],
    out: str | os.PathLike[str] | None = None,
    candidates: Sequence[Method] | None = None,
    spans: Sequence[float] | None = None,
    dense_steps: float = 0.0,
    seed: int = 0,
    rows: int = ROWS,
    probe_steps: int = 1,
    masks: MaskSettings = USUAL_MASKS,
    step_caches: bool = True,
    exact: bool = False,
    scores_path: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Profile:
    """Measures what `search_plan` measures, and keeps it where that does, for plans of any budget (`Profile.joint`).

    Arguments and errors as of `search_plan`; `out` is the file that a plan will be written to, beside which the scores stand.
    """
    profile, _ = _search(
        pipe,
        prompts,
        call=call,
        budget=None,
        out=out,
        candidates=candidates,
        spans=spans,
        dense_steps=dense_steps,
        span_weights=None,
        seed=seed,
        rows=rows,
        probe_steps=probe_steps,
        masks=masks,
        step_caches=step_caches,
        correct=False,
        exact=exact,
        scores_path=scores_path,
        progress=progress,
    )
    return profile


def _search(
    pipe: Any,
    prompts: Sequence[Prompt],
    *,
    call: Mapping[str, Any],
    budget: Budget | None,
    out: str | os.PathLike[str] | None,
    candidates: Sequence[Method] | None,
    spans: Sequence[float] | None,
    dense_steps: float,
    span_weights: Sequence[float] | None,
    seed: int,
    rows: int,
    probe_steps: int,
    masks: MaskSettings,
    step_caches: bool,
    correct: bool,
    exact: bool,
    scores_path: str | os.PathLike[str] | None,
    progress: bool,
) -> tuple[Profile, Plan | None]:
    """What was measured, and the plan that was asked for, if one was."""
    found = check_pipeline(pipe)
    check_searchable(pipe, found)
    prompts = check_prompts(pipe, prompts)
    call = check_call(pipe, call)
    dense_steps = dense_share(pipe, call, dense_steps)
    edges = borders(spans, dense_steps)
    weights = check_weights(span_weights, len(edges))
    if not isinstance(masks, MaskSettings):
        raise TypeError(f"masks: expected a MaskSettings, found {quoted(masks)}")
    families = [family for _, family in found.values()]
    chosen = check_candidates(candidates_for(pipe) if candidates is None else candidates, families)
    settings = ProbeSettings(
        chosen,
        edges,
        whole_number("rows", rows, 2),
        whole_number("probe_steps", probe_steps, 1),
        whole_number("seed", seed, 0),
        masks,
    )
    kind = "speedup" if budget is None else budget.kind
    measures_spans = weights is None and kind != "sparse_vdit"
    if measures_spans:
        check_callback(pipe)
    if not isinstance(correct, bool):
        raise TypeError(f"correct: expected True or False, found {quoted(correct)}")
    if not isinstance(exact, bool):
        raise TypeError(f"exact: expected True or False, found {quoted(exact)}")
    if exact:
        check_solver()
    caches = bool(step_caches) and kind == "speedup" and measures_spans and not makes_chunks(found)
    ask = Ask(budget, dense_steps, weights, caches, correct, exact)
    with processes() as here:
        plan_file, scores_file = here.first(partial(check_places, out, scores_path))
        screen = Screen(progress and here.is_first)
        search = _Search(pipe, found, prompts, call, settings, ask, screen, measures_spans, here)
        identity = search.identity()
        here.agree(
            "search",
            {
                **identity,
                "budget": budget and budget.to_json(),
                "dense_steps": dense_steps,
                "span_weights": weights,
                "correct": correct,
                "exact": exact,
            },
        )
        path = scores_file or here.first(partial(cached_scores, identity))
        keeper = Keeper(path, partial(search.check, str(path)), len(prompts), len(edges))
        with _alone(path, here), _telling(keeper, here):
            screen.say(f"calibration runs are kept in {path}")
            profile = search.profile(keeper)
            plan = search.plan(profile, keeper.path) if budget is not None else None
            if plan is not None and plan_file is not None:
                here.first(partial(_save, plan, plan_file))
    return profile, plan


@dataclass(frozen=True)
class Ask:
    """What is asked of the plan, and of no measurement."""

    budget: Budget | None
    dense_steps: float
    span_weights: tuple[float, ...] | None
    step_caches: bool
    correct: bool
    exact: bool


@contextmanager
def _alone(path: Path, here: Processes) -> Iterator[None]:
    """No other search measures into the scores meanwhile; the first process sees to that for all."""
    with ExitStack() as held:

        def hold() -> None:
            held.enter_context(only_writer(path, "another search measures into it"))

        here.first(hold)
        yield


@contextmanager
def _telling(keeper: Keeper, here: Processes) -> Iterator[None]:
    """Whatever ends a search early says what is kept."""
    try:
        yield
    except KeyboardInterrupt as error:
        raise Interrupted(_kept(keeper, here), GO_ON) from error
    except OutOfReach as error:
        raise OutOfReach(f"{error}. Of the search, {_kept(keeper, here)}") from error


def _kept(keeper: Keeper, here: Processes) -> str:
    return keeper.kept() if here.is_first else f"finished prompts are kept by the first process, in {keeper.path}"


def _save(plan: Plan, path: Path) -> None:
    plan.save(path)


def _save_steps(steps: StepOptions, path: Path) -> None:
    steps.save(path)


class _Search:
    """One search on one pipeline, or on one in each process. What all processes know (scores, times) is the same in all, so
    that they decide the same."""

    def __init__(
        self,
        pipe: Any,
        found: Found,
        prompts: tuple[Prompt, ...],
        call: dict[str, Any],
        settings: ProbeSettings,
        ask: Ask,
        screen: Screen,
        measures_spans: bool,
        here: Processes,
    ) -> None:
        self.pipe = pipe
        self.prompts = prompts
        self.call = call
        self.settings = settings
        self.ask = ask
        self.screen = screen
        self.measures_spans = measures_spans
        self.here = here
        self.reference: Ending | None = None  # of the first prompt, dense
        self.chunked = makes_chunks(found)
        self.remarks: set[str] = set()
        self.labels = [prompt_label(prompt) for prompt in prompts]
        self.models = {name: family.shape(module) for name, (module, family) in found.items()}
        self.family = next(iter(found.values()))[1].name
        self.config = configuration(pipe, found, call, settings)

    def identity(self) -> dict[str, Any]:
        """JSON data that is equal for searches that go on with each other's scores without being told to."""
        return {
            **self.config,
            "models": {name: asdict(model) for name, model in self.models.items()},
            "candidates": [method.to_json() for method in self.settings.candidates],
            "spans": self.settings.spans,
            "prompts": self.labels,
            **environment(self.pipe),
        }

    def check(self, where: str, scores: Scores) -> None:
        """Refuses scores that another search measured."""
        check_same_search(scores, where, self.config, self.models, self.settings, self.labels)

    def profile(self, keeper: Keeper) -> Profile:
        """All measurements; they are kept on the way."""
        scores = self.probe(keeper)
        cost = self.here.first(partial(self.cost, scores, keeper.path))
        ask = self.ask
        if self.measures_spans:
            if ask.budget is not None and not ask.step_caches:
                # How spans are weighed decides nothing about what can be reached, so that is known before they are measured.
                assign(scores, cost, ask.budget, dense_steps=ask.dense_steps)
            scores = self.spans(scores, keeper)
        return Profile(scores, cost, self.steps(scores, keeper.path) if ask.step_caches else None, ask.exact)

    def _with_steps(self, profile: Profile, speedup: float, path: Path) -> Assignment:
        """Of heads and steps for a speed-up. The best choices of steps were run alone then, which is kept."""
        joint = profile.joint(self.ask.dense_steps)
        measured = MeasuredSteps(self.pipe, self.prompts[:1], self.call, self.settings.seed)
        alone = StepsAlone(
            joint, lambda forwards: self.here.first(partial(measured.error, forwards)), MOST_ALONE, self.screen.say
        )
        ranked = alone.settle(lambda enough: joint.ranked(speedup, measured_first=enough), 1)
        self.here.first(partial(_save_steps, joint.steps, steps_file(path)))
        return joint.best([each for each in ranked if each.steps is None or each.steps.measured] or ranked)

    def plan(self, profile: Profile, path: Path) -> Plan:
        """The plan that was asked for; `path`: of the scores."""
        ask = self.ask
        assert ask.budget is not None
        if profile.steps is not None:
            found = self._with_steps(profile, ask.budget.value, path)
        else:
            found = assign(
                profile.scores,
                profile.cost,
                ask.budget,
                dense_steps=ask.dense_steps,
                span_weights=ask.span_weights,
                exact=ask.exact,
            )
        self.screen.say(_expected(found))
        plan = profile.plan(found, ask.budget, ask.correct)
        for warning in plan.provenance.get("warnings", ()) if self.here.is_first else ():
            self.screen.warn(warning)
        return plan

    def probe(self, keeper: Keeper) -> Scores:
        """The scores of all prompts; runs that were kept are not repeated."""
        scores = self.here.first(keeper.load)
        done = len(scores.runs) if scores else 0
        if scores and done >= len(self.prompts):
            self.screen.say(f"probe: all {done} prompts were finished before")
            return scores
        trial = self.here.each(self._trial)[0]  # which also warms up every process
        if not self.chunked:  # the first chunk has less to attend to than later ones
            self._check_reach(trial.attention_share, trial.steps, "a step")
        if scores is None:
            scores = self._empty(trial.layout, trial.steps)
        check_layout(scores, trial.layout, str(keeper.path))
        self._estimate(trial, done)
        if self.settings.in_segments and len(self.prompts) == 1:
            self.screen.say(
                "stored masks cannot be chosen: the first prompt makes them, it takes a second one to judge them"
            )
        with self.screen.bar("probe", trial.steps * len(self._rounds(done))) as advance:
            rounds = 0
            while len(scores.runs) < len(self.prompts):
                on_step = partial(_advance, advance, trial.steps * rounds)
                together, rounds = self._rounds(len(scores.runs))[0], rounds + 1
                scores = self._save(keeper, self._plus(scores, trial, together, on_step))
                self._check_reach(scores.attention_share, trial.steps, "a generation")
        return scores

    def _rounds(self, done: int) -> list[range]:
        """The numbers of the prompts that are run together, one in each process, when so many are done. The first is alone where
        others need what it records."""
        left = range(done, len(self.prompts))
        alone = 1 if left and done == 0 and self.settings.first_run_first else 0
        starts = range(left.start + alone, left.stop, self.here.count)
        return [range(done, 1)] * alone + [range(each, min(each + self.here.count, left.stop)) for each in starts]

    def _plus(self, scores: Scores, trial: Trial, together: range, on_step: Callable[[int], None]) -> Scores:
        """The scores and those of some prompts, in their order."""

        def own() -> tuple[CalibrationRun, dict[str, Array]] | None:
            rank = self.here.rank
            return self._run(scores, trial, together[rank], on_step) if rank < len(together) else None

        for found in self.here.each(own)[: len(together)]:
            assert found is not None
            scores = scores.plus(*found)
        return scores

    def _save(self, keeper: Keeper, scores: Scores) -> Scores:
        """Keeps `scores`; returns what is kept then, see `Keeper.save`."""

        def save() -> Scores | None:
            kept = keeper.save(scores)
            return None if kept is scores else kept

        return self.here.first(save) or scores

    def cost(self, scores: Scores, path: Path) -> Cost:
        """The time of every candidate on this pipeline's device, at its shape, with its attention backend; kept as well."""
        with self.screen.bar("cost", 100) as advance:
            timer = CostTimer(scores, str(path), COST_SECONDS, lambda share: advance(int(100 * share)))
            run_pipeline(self.pipe, timer.engine, self.prompts[0], self.call, self.settings.seed)
        timer.cost.save(cost_file(path))
        return timer.cost

    def spans(self, scores: Scores, keeper: Keeper) -> Scores:
        """The scores with the impacts of every span and layer; those that were kept are not measured again."""
        first = len(scores.impacts)
        if first == len(scores.spans):
            return scores
        if self.here.count > 1:
            self.reference = self.here.first(self._reference)
        with self.screen.bar("spans", 100 * (len(scores.spans) - first)) as advance:
            while (span := len(scores.impacts)) < len(scores.spans):
                own, on_percent = span + self.here.rank, partial(_advance, advance, 100 * (span - first))
                values = self.here.each(partial(self._impacts, scores, own, on_percent))
                measured = (*scores.impacts, *(value for value in values if value is not None))
                scores = self._save(keeper, replace(scores, impacts=measured))
                advance(100 * (len(scores.impacts) - first))
        return scores

    def steps(self, scores: Scores, path: Path) -> StepOptions:
        """The step caches to choose from; those that were kept are not looked for again."""
        file = steps_file(path)
        found = self.here.first(lambda: StepOptions.load(file) if file.exists() else None)
        if found is not None and found.config == self.config:
            return found
        prompts = self.prompts[:PROMPTS]

        def measured() -> StepOptions:
            with self.screen.bar("steps", len(prompts)) as advance:
                options = measure_steps(self.pipe, prompts, self.call, self.settings.seed, scores.seconds, advance)
            options = replace(options, config=self.config)
            options.save(file)
            return options

        return self.here.first(measured)

    def _check_reach(self, share: float, steps: int, of: str) -> None:
        if self.ask.budget is None or self.ask.step_caches:
            return  # what they save is not known before they are looked at
        check_reach(self.ask.budget, share, open_share(self.settings.spans, steps, self.ask.dense_steps), of)

    def _out_of_reach(self, trial: Trial) -> bool:
        if self.chunked:
            return False
        try:
            self._check_reach(trial.attention_share, trial.steps, "a step")
        except OutOfReach:
            return True
        return False

    def _reference(self) -> Ending:
        if self.reference is None:
            self.reference = self._ending(lambda site: Dense(), lambda percent: None)
        return self.reference

    def _impacts(
        self, scores: Scores, span: int, on_percent: Callable[[int], None]
    ) -> dict[str, tuple[float, ...]] | None:
        """Of one span, per transformer and layer; None where there is no such span."""
        if span >= len(scores.spans):
            return None
        choice = span_choice(scores, span)
        if not any(error.any() for error in layer_errors(scores, choice).values()):  # no call falls into this span
            return {name: (0.0,) * model.layers for name, model in scores.models.items()}
        reference = self._reference()
        if self.chunked:  # a forward that is run again would write its history again: layers have equal weights
            moved = drift(self._ending(plan_engine(scores, choice), on_percent).latents, reference.latents)
            unknown = {name: np.zeros(model.layers) for name, model in scores.models.items()}
            return impacts(scores, choice, span, unknown, moved)
        gains = LayerGains(
            scores,
            span,
            layer_choice(scores, span),
            plan_engine(scores, choice),
            self.settings.probe_steps,
            self._remark,
        )
        with gains.watching(self.pipe):
            moved = drift(self._ending(gains.engine, on_percent).latents, reference.latents)
        return impacts(scores, choice, span, gains.found(), moved)

    def _remark(self, text: str) -> None:
        """Warns of something once."""
        if text not in self.remarks:
            self.remarks.add(text)
            self.screen.warn(text)

    def _ending(self, make_engine: Callable[[Site], Engine], on_percent: Callable[[int], None]) -> Ending:
        """Of the first prompt; without its decoder, once the number of its steps is known."""
        steps = None if self.reference is None else self.reference.steps
        last = LastLatents(steps, lambda share: on_percent(int(100 * share)))
        run_pipeline(self.pipe, make_engine, self.prompts[0], self.call, self.settings.seed, last)
        return last.ending

    def _run(
        self, scores: Scores, trial: Trial, number: int, on_step: Callable[[int], None]
    ) -> tuple[CalibrationRun, dict[str, Array]]:
        """One calibration run, and of its sums those that hold something: stored masks take gigabytes, in the first run only."""
        probe = RunProbe(
            self.settings,
            self.models,
            trial.layout,
            trial.steps,
            scores.sums,
            number,
            lambda call: on_step(now(call)[0]),
        )
        begin = time.perf_counter()
        last = LastLatents() if self.measures_spans and number == 0 else None
        run_pipeline(self.pipe, probe.engine, self.prompts[number], self.call, self.settings.seed + number, last)
        seconds = time.perf_counter() - begin
        if last is not None:
            self.reference = last.ending
        on_step(trial.steps)
        sums = {name: array for name, array in probe.sums.items() if array.any()}
        return probe.finished(prompt_label(self.prompts[number]), seconds), sums

    def _trial(self) -> Trial:
        def make_probe(layout: TokenLayout, steps: int) -> RunProbe:
            return RunProbe(self.settings, self.models, layout, steps, self._empty(layout, steps).sums, 0)

        stopwatch = Stopwatch(make_probe, self._out_of_reach)
        run_pipeline(self.pipe, stopwatch.engine, self.prompts[0], self.call, self.settings.seed)
        return stopwatch.result()

    def _empty(self, layout: TokenLayout, steps: int) -> Scores:
        methods, spans = self.settings.candidates, self.settings.spans
        segments = len(ProbeSchedule.of(self.settings, steps).segments)
        return Scores(
            family=self.family,
            models=self.models,
            layout=layout,
            candidates=methods,
            spans=spans,
            segments=segments,
            config=self.config,
            provenance=versions(self.pipe, layout),
            runs=(),
            sums=Scores.zeros(self.models, len(spans), methods, layout, segments),
        )

    def _estimate(self, trial: Trial, done: int) -> None:
        schedule = ProbeSchedule.of(self.settings, trial.steps)
        layers = max(model.layers for model in self.models.values())
        rounds = len(self._rounds(done))
        generation = trial.steps * trial.step_seconds
        per_run = generation + schedule.observed * trial.calls * layers * trial.measure_seconds
        # At most: the orders, which the trial has chosen too, are chosen only once.
        masks = len(schedule.segments) * layers * trial.calibrate_seconds if done == 0 else 0.0
        # A generation for each span and, at its measured steps, a forward for each layer.
        span = generation + self.settings.probe_steps * (layers + 1) * trial.step_seconds
        spans = -(-len(self.settings.spans) // self.here.count) * span if self.measures_spans else 0.0
        model = next(iter(self.models.values()))
        device = torch.device(self.pipe._execution_device)
        memory = measuring_bytes(trial.layout.tokens, model, self.settings, device)
        self.screen.say(
            f"search: {trial.layout.tokens:,} tokens, {len(self.settings.candidates)} candidates; {done} of {len(self.prompts)} "
            f"prompts finished before; about {clock(rounds * per_run + masks + spans + 1.5 * COST_SECONDS)} to go, "
            f"and {memory / 2**20:,.0f} MiB beside the pipeline's own memory{self._side_by_side()}"
            + ", for each chunk of a video: later ones have more to attend to"
            * self.chunked
        )

    def _side_by_side(self) -> str:
        return f", in each of {self.here.count} processes" if self.here.count > 1 else ""


def _expected(found: Assignment) -> str:
    """What a plan is expected to do, in a line."""
    computed = f", {len(found.steps.computed)} steps computed ({found.steps.forwards.label})" if found.steps else ""
    return (
        f"plan: expected {found.speedup:.2f}x{computed}, density {found.density:.2f}, "
        f"attention {found.attention_ratio:.0%} of dense, error {found.error:.2g}{gap_words(found.gap)}"
    )


def _advance(advance: Callable[[int], None], before: int, step: int) -> None:
    advance(before + step)
