"""The search: probe -> scores -> cost -> assign -> plan, on the user's own loaded pipeline."""

from __future__ import annotations

import hashlib
import os
import platform
import string
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn

import diffusers_accel
from diffusers_accel.families import Family, find
from diffusers_accel.layout import TokenLayout
from diffusers_accel.methods import Method
from diffusers_accel.plan import Plan, Span
from diffusers_accel.search.assign import Assignment, Budget, assign
from diffusers_accel.search.candidates import candidates as default_candidates
from diffusers_accel.search.candidates import check_candidates
from diffusers_accel.search.cost import Cost, describe_device, launches, time_candidates
from diffusers_accel.search.probe import PassProbe, Settings, chosen_steps, measuring_bytes, realised_density
from diffusers_accel.search.running import Enough, Prompt, check_call, now, plain, prompt_label, run_pipeline
from diffusers_accel.search.scores import Scores
from diffusers_accel.shape import ModelShape
from diffusers_accel.site import DenseAttention, Site

SPANS = (0.1, 0.3, 0.6)  # borders: short spans first, where the layout of the video is decided
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
        candidates: methods to choose from, the first of them dense; None: `search.candidates.candidates()`.
        spans: inner borders of the stretches of the schedule that are decided separately, ascending in (0, 1); None:
            0.1, 0.3 and 0.6, and `dense_steps`.
        dense_steps: share of the schedule, from its start, that stays dense.
        span_weights: how much an error in each span matters; None: equally per call.
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
    chosen = check_candidates(default_candidates() if candidates is None else candidates)
    settings = Settings(chosen, edges, rows, probe_steps, seed)
    screen = _Screen(progress)
    search = _Search(pipe, prompts, dict(call), settings, screen)
    scores = search.probe(None if scores_path is None else Path(scores_path))
    cost = search.cost(scores)
    if scores_path is not None:
        cost.save(Path(scores_path).with_suffix(".cost.json"))
    assignment = assign(scores, cost, budget, dense_steps=dense_steps, span_weights=span_weights)
    screen.say(
        f"plan: expected {assignment.speedup:.2f}x, density {assignment.density:.2f}, "
        f"attention {assignment.attention_ratio:.0%} of dense, error {assignment.error:.2g}"
    )
    return make_plan(scores, cost, assignment, budget)


def make_plan(scores: Scores, cost: Cost, assignment: Assignment, budget: Budget) -> Plan:
    """The plan file's content for an assignment: symbols, spans, tensors, and where it comes from."""
    symbols = _symbols(scores.candidates)
    used = sorted({int(index) for table in assignment.choice.values() for index in table.ravel()})
    spans = []
    for number, (start, stop) in enumerate(scores.spans):
        heads = {
            name: tuple("".join(symbols[index] for index in layer) for layer in table[number])
            for name, table in assignment.choice.items()
        }
        spans.append(Span(start, stop, heads))
    tensors: dict[str, Tensor] = {}
    if any(scores.candidates[index].calibrated for index in used):
        tensors = {f"stripe_mass/{name}": torch.from_numpy(scores.stripe_mass(name)) for name in scores.models}
    return Plan(
        family=scores.family,
        models=dict(scores.models),
        methods={symbols[index]: scores.candidates[index] for index in used},
        spans=tuple(_joined(spans)),
        budget=_budget_json(budget),
        provenance={
            "search": scores.config,
            **scores.provenance,
            "prompts": [done.prompt for done in scores.passes],
            "cost": {"device": cost.device, "tokens": cost.tokens, "batch": cost.batch, "rounds": cost.rounds},
            "predicted": {
                "error": assignment.error,
                "density": assignment.density,
                "attention_ratio": assignment.attention_ratio,
                "attention_share": scores.attention_share,
                "speedup": assignment.speedup,
            },
        },
        tensors=tensors,
    )


@dataclass
class _Trial:
    """What the first step of a generation tells: how the tokens lie, how many steps there are, how long each thing takes."""

    layout: TokenLayout
    steps: int
    measured_seconds: float
    step_seconds: float = 0.0


class _Search:
    """One search on one pipeline."""

    def __init__(
        self, pipe: Any, prompts: tuple[Prompt, ...], call: dict[str, Any], settings: Settings, screen: _Screen
    ) -> None:
        self.pipe = pipe
        self.prompts = prompts
        self.call = call
        self.settings = settings
        self.screen = screen
        self.found = find(pipe)
        self.models = {name: family.shape(module) for name, (module, family) in self.found.items()}
        self.family = next(iter(self.found.values()))[1].name
        self.config = {
            "pipeline": type(pipe).__name__,
            "model": str(getattr(pipe.config, "_name_or_path", None) or ""),
            "weights": fingerprint(self.found),
            "call": plain(call),
            "seed": settings.seed,
            "rows": settings.rows,
            "probe_steps": settings.probe_steps,
        }

    def probe(self, path: Path | None) -> Scores:
        """The scores of all prompts; passes that `path` holds are not run again."""
        scores = self._resume(path) if path is not None and path.exists() else None
        done = len(scores.passes) if scores else 0
        if scores and done >= len(self.prompts):
            self.screen.say(f"probe: all {done} prompts were finished before, in {path}")
            return scores
        trial = self._trial()
        if scores is None:
            scores = self._empty(trial.layout)
        self._estimate(trial, done)
        left = range(done, len(self.prompts))
        with self.screen.bar("probe", trial.steps * len(left)) as advance:
            for number in left:
                scores = self._pass(scores, trial, number, lambda step: advance(trial.steps * (number - done) + step))
                if path is not None:
                    scores.save(path)
        return scores

    def cost(self, scores: Scores) -> Cost:
        """The time of every candidate on this pipeline's device, at its shape, with its attention backend."""
        result: list[Cost] = []
        with self.screen.bar("cost", 100) as advance:
            timing = _CostEngine(self, scores, result, lambda share: advance(int(100 * share)))
            run_pipeline(self.pipe, timing.engine, self.prompts[0], self.call, self.settings.seed)
        return result[0]

    def _pass(self, scores: Scores, trial: _Trial, number: int, on_step: Callable[[int], None]) -> Scores:
        probe = PassProbe(
            self.settings, self.models, trial.layout, scores.sums, number, lambda site: on_step(now(site)[0])
        )
        begin = time.perf_counter()
        run_pipeline(self.pipe, probe.engine, self.prompts[number], self.call, self.settings.seed + number)
        seconds = time.perf_counter() - begin
        on_step(trial.steps)
        return scores.plus(probe.finished(prompt_label(self.prompts[number]), seconds), probe.sums)

    def _trial(self) -> _Trial:
        stopwatch = _Stopwatch(self)
        run_pipeline(self.pipe, stopwatch.engine, self.prompts[0], self.call, self.settings.seed)
        return stopwatch.result()

    def _empty(self, layout: TokenLayout) -> Scores:
        grid = (layout.frames, layout.height)
        methods, spans = self.settings.candidates, self.settings.spans
        return Scores(
            family=self.family,
            models=self.models,
            grid=grid,
            candidates=methods,
            densities=tuple(realised_density(method, layout, self.models) for method in methods),
            spans=spans,
            config=self.config,
            provenance=_versions(self.pipe, layout),
            passes=(),
            sums=Scores.zeros(self.models, len(spans), len(methods), grid),
        )

    def _resume(self, path: Path) -> Scores:
        scores = Scores.load(path)
        mine = {**self.config, "models": self.models, "candidates": self.settings.candidates, "spans": self.settings.spans}
        theirs = {**scores.config, "models": scores.models, "candidates": scores.candidates, "spans": scores.spans}
        for key in sorted({*mine, *theirs}):
            if mine.get(key) != theirs.get(key):
                raise ValueError(
                    f"{path} was measured with {key} = {theirs.get(key)}, this search has {mine.get(key)}: their scores cannot "
                    f"be mixed. Give the search another scores_path, or the same {key}"
                )
        for number, (done, prompt) in enumerate(zip(scores.passes, self.prompts)):
            if done.prompt != prompt_label(prompt):
                raise ValueError(
                    f"{path}: prompt {number} was {done.prompt!r}, this search has {prompt_label(prompt)!r}; prompts can be "
                    "added at the end only. Give the search another scores_path"
                )
        if len(scores.passes) > len(self.prompts):
            raise ValueError(f"{path} holds {len(scores.passes)} prompts, this search has {len(self.prompts)}: give it all of them")
        return scores

    def _estimate(self, trial: _Trial, done: int) -> None:
        steps = len(chosen_steps(self.settings.spans, trial.steps, self.settings.probe_steps))
        layers = max(model.layers for model in self.models.values())
        passes = len(self.prompts) - done
        calls_per_step = 1 + int(float(self.call.get("guidance_scale", 5.0)) > 1)
        per_pass = trial.steps * trial.step_seconds + steps * calls_per_step * layers * trial.measured_seconds
        model = next(iter(self.models.values()))
        memory = measuring_bytes(trial.layout.tokens, model.head_dim, self.settings.rows)
        self.screen.say(
            f"search: {trial.layout.tokens:,} tokens, {len(self.settings.candidates)} candidates; {done} of {len(self.prompts)} "
            f"prompts finished before; about {_clock(passes * per_pass + 1.5 * COST_SECONDS)} to go, "
            f"and {memory / 2**20:,.0f} MiB beside the pipeline's own memory"
        )


class _Stopwatch:
    """Engine of the trial: measures one call, then times the rest of the first step and stops."""

    def __init__(self, search: _Search) -> None:
        self.search = search
        self.trial: _Trial | None = None
        self.begin = 0.0

    def engine(self, site: Site) -> _Timed:
        return _Timed(self, site)

    def attend(self, site: Site, q: Tensor, k: Tensor, v: Tensor, dense: DenseAttention) -> Tensor:
        step, steps = now(site)
        if self.trial is None:
            self.trial = self._first(site, steps, q, k, v)
            self.begin = time.perf_counter()
        elif step > 0:
            self._stop(q.device)
            raise Enough
        return dense(q, k, v)

    def result(self) -> _Trial:
        if self.trial is None:
            raise RuntimeError(f"{type(self.search.pipe).__name__} never called its self-attention: nothing to search for")
        if not self.trial.step_seconds:  # a schedule of one step
            self.trial.step_seconds = time.perf_counter() - self.begin
        return self.trial

    def _first(self, site: Site, steps: int, q: Tensor, k: Tensor, v: Tensor) -> _Trial:
        search, layout = self.search, site.layout()
        empty = search._empty(layout)
        for _ in range(2):  # the first one warms up
            probe = PassProbe(search.settings, search.models, layout, empty.sums, 0)
            probe.measure(site, 0, 0, q, k, v)
        return _Trial(layout, steps, probe.measuring_seconds)

    def _stop(self, device: torch.device) -> None:
        assert self.trial is not None
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        self.trial.step_seconds = time.perf_counter() - self.begin


@dataclass(frozen=True)
class _Timed:
    owner: Any
    site: Site

    def attend(self, q: Tensor, k: Tensor, v: Tensor, dense: DenseAttention) -> Tensor:
        return self.owner.attend(self.site, q, k, v, dense)


class _CostEngine:
    """Engine that times the candidates on the first call's own q, k and v, and stops."""

    def __init__(
        self, search: _Search, scores: Scores, result: list[Cost], on_round: Callable[[float], None]
    ) -> None:
        self.search = search
        self.scores = scores
        self.result = result
        self.on_round = on_round

    def engine(self, site: Site) -> _Timed:
        return _Timed(self, site)

    def attend(self, site: Site, q: Tensor, k: Tensor, v: Tensor, dense: DenseAttention) -> Tensor:
        models = self.search.models
        name, shape = site.transformer, site.model.shape
        if {(each.heads, each.head_dim) for each in models.values()} != {(shape.heads, shape.head_dim)}:
            raise ValueError(f"expected transformers of equal heads, whose kernels cost the same, found {models}")
        tensors = {f"stripe_mass/{name}": torch.from_numpy(self.scores.stripe_mass(name))}
        planned = launches(self.search.settings.candidates, site.layout(), name, shape, tensors, q.device)
        ms, rounds = time_candidates(planned, q, k, v, dense, COST_SECONDS, self.on_round)
        times = {each: tuple(float(value) for value in ms) for each in models}
        self.result.append(Cost(times, describe_device(q.device), q.shape[1], q.shape[0], rounds))
        raise Enough


class _Screen:
    """What the user sees, on stderr; nothing when `shown` is False."""

    def __init__(self, shown: bool) -> None:
        self.console = Console(stderr=True, quiet=not shown)

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False, soft_wrap=True, markup=False)

    def bar(self, title: str, total: int) -> _Bar:
        return _Bar(self.console, title, total)


class _Bar:
    """A progress bar with the time left; inside the `with`, a function that sets how far it is."""

    def __init__(self, console: Console, title: str, total: int) -> None:
        columns = (TextColumn(title), BarColumn(), TextColumn("{task.percentage:.0f} %"), TimeElapsedColumn())
        self.progress = Progress(*columns, TextColumn("left"), TimeRemainingColumn(), console=console, disable=console.quiet)
        self.total = total

    def __enter__(self) -> Callable[[int], None]:
        self.progress.start()
        task = self.progress.add_task("", total=self.total)
        return lambda done: self.progress.update(task, completed=done)

    def __exit__(self, *_: object) -> None:
        self.progress.stop()


def fingerprint(found: Mapping[str, tuple[nn.Module, Family]]) -> str:
    """Tells one set of weights from another: a hash of the vectors (norms, biases) and of LoRA's matrices."""
    digest = hashlib.sha256()
    for name, (module, _) in found.items():
        for path, parameter in module.named_parameters():
            if parameter.is_meta or (parameter.dim() > 1 and "lora_" not in path):
                continue
            digest.update(f"{name}.{path}".encode())
            digest.update(parameter.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _borders(spans: Sequence[float] | None, dense_steps: float) -> tuple[tuple[float, float], ...]:
    if not 0 <= dense_steps <= 1:
        raise ValueError(f"dense_steps is a share of the schedule, expected in [0, 1], found {dense_steps}")
    inner = sorted({*SPANS, dense_steps} - {0.0, 1.0}) if spans is None else [float(border) for border in spans]
    if any(not 0 < border < 1 for border in inner) or sorted(set(inner)) != inner:
        raise ValueError(f"spans are inner borders of the schedule, ascending in (0, 1), found {spans}")
    edges = [0.0, *inner, 1.0]
    return tuple(zip(edges, edges[1:]))


def _joined(spans: list[Span]) -> list[Span]:
    """Neighbours that decide alike as one span."""
    joined = spans[:1]
    for span in spans[1:]:
        if span.heads == joined[-1].heads:
            joined[-1] = Span(joined[-1].start, span.stop, span.heads)
        else:
            joined.append(span)
    return joined


def _symbols(methods: tuple[Method, ...]) -> list[str]:
    """"." for dense, "0" for skip, letters for the rest in the order of the candidates."""
    letters = iter(string.ascii_letters + string.digits[1:])
    return ["." if method.dense else "0" if method.skips else next(letters) for method in methods]


def _budget_json(budget: Budget) -> dict[str, Any]:
    if budget.kind == "paper":
        return {"kind": "paper", "epsilon": budget.value, "lambda": budget.penalty, "mse": budget.mse, "cost": budget.cost}
    return {"kind": budget.kind, "value": budget.value}


def _versions(pipe: Any, layout: TokenLayout) -> dict[str, Any]:
    return {
        "diffusers_accel": diffusers_accel.__version__,
        "diffusers": diffusers.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": describe_device(torch.device(pipe._execution_device)),
        "layout": {"frames": layout.frames, "height": layout.height, "width": layout.width, "text_tokens": layout.text_tokens},
    }


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
