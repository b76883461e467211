"""Dense against patched in one run: the same prompts, seeds and noise, speed and quality, clip by clip."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import msgspec
import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from diffusers_accel.api import Patch, patch
from diffusers_accel.evals import arguments
from diffusers_accel.evals.clip_record import ClipNumbers, ClipRecord, LayerSeen, Seen
from diffusers_accel.evals.floor import another_kernel, describe
from diffusers_accel.evals.floor_rows import floor_rows
from diffusers_accel.evals.generate import (
    PipelineRun,
    Prompt,
    SharedNoise,
    attribute,
    device_of,
    generate,
    memory_kind,
    prompt_text,
)
from diffusers_accel.evals.host_use import HostUse, apart, switched_on
from diffusers_accel.evals.kept import Identity, KeptClips, identify
from diffusers_accel.evals.machine import git_sha, machine, versions
from diffusers_accel.evals.metrics import DEFAULT, METRICS, Scored
from diffusers_accel.evals.order import SEED as ORDER_SEED
from diffusers_accel.evals.order import order
from diffusers_accel.evals.pairs import pair_rows
from diffusers_accel.evals.report import Clip, Report, Subject
from diffusers_accel.evals.report.findings import FLOOR
from diffusers_accel.evals.report.video import difference_pixels, encode, pixels
from diffusers_accel.evals.set_films import SetFilms
from diffusers_accel.evals.shown import WorstSoFar, drop_films, worst_of_records
from diffusers_accel.evals.tally import (
    BASELINE,
    WARM_UP_STEPS,
    SubjectTally,
    cost_rows,
    noise_rows,
    protocol,
    quality_rows,
    speed_rows,
    warm_up_rows,
)
from diffusers_accel.families import find
from diffusers_accel.files import printable, quoted
from diffusers_accel.plan import Plan
from diffusers_accel.plan.size import check_size
from diffusers_accel.subject import Patchable
from diffusers_accel.support.interrupted import Interrupted
from diffusers_accel.support.log import LOG
from diffusers_accel.support.processes import ALONE, Processes, processes
from diffusers_accel.support.progress import ProgressLines

DISTRIBUTIONS = ("torch", "triton", "diffusers", "diffusers-accel", "numpy")  # beside those of the metrics
# What a subject may be; a pair gives the parameters of `patch`: of a named method, and cache_memory_fraction.
PlanLike = Patchable | tuple[Patchable, Mapping[str, Any]]


def compare(
    pipe: Any,
    subjects: Mapping[str, PlanLike],
    prompts: Sequence[Prompt],
    *,
    call: Mapping[str, Any],
    seeds: Sequence[int] = (0,),
    metrics: Sequence[str] = DEFAULT,
    rounds: int = 1,
    show: int = 4,
    fps: int = 16,
    floor: bool = True,
    progress: bool = True,
    keep: str | os.PathLike[str] | None = None,
) -> Report:
    """Measure what patching wins and what it costs, against the same pipeline unpatched.

    Every prompt is run with every seed; each such clip is generated dense, then with each subject, then dense again. The
    pipeline is left as it was found, whatever happens.

    Where torch.distributed is initialised, as under `accelerate launch`, all its processes make the same call, each with the
    whole pipeline on a device of its own. Clips are dealt over them, all runs of a clip in one process, and all get the same
    report; the first one alone keeps clips and shows progress, and should alone save. One that fails ends the comparison in all.

    Args:
        pipe: a loaded, unpatched pipeline of a supported family.
        subjects: name -> what `patch` takes: a Plan, a method's name, a path to a plan file, a Method, Recipe or step cache, a
            list such as ["easycache", "draft"]; or (one of these, parameters of `patch`), such as ("cached", {"refresh_every": 2,
            "cache_memory_fraction": 0.5}). Under a step cache alone attention is patched to be dense, so that its time is
            measured. Also what diffusers does itself, alone or in such a list (`evals.host_use`): one of its caches, as
            ("first_block_cache", {"threshold": 0.1}), or another backend of dense attention, as ("backend", {"name": "sage"}).
        prompts: texts; or mappings of pipeline arguments, such as prompt_embeds, for a pipeline without a text encoder.
        call: what else the pipeline is called with, such as height, width, num_frames, num_inference_steps, guidance_scale.
        seeds: of the CPU generator that makes the initial noise.
        metrics: names out of `METRICS`, of any kind. One that cannot be computed here gives rows without value that say why.
        rounds: how many patched runs of each clip are timed, each between two dense ones.
        show: so many clips, the worst, are kept as video for the report's page.
        fps: of those videos.
        floor: run each clip once more, with dense attention in another exact kernel (`evals.floor`): the distance that a mere
            change of kernel makes, which stands in every table and chart. Costs that run: the time of a dense one on a GPU, on a
            CPU its attention takes about 2.5 times as long.
        progress: show a progress bar.
        keep: a folder in which each clip is kept as soon as it is finished. The same comparison, started again after whatever
            stopped it, measures the others only; `Report.save` removes the folder. None keeps nothing.

    Raises:
        ValueError, TypeError: an argument is not as expected, or the pipeline is patched already; before any clip is made.
        OSError: `keep` cannot be written.
        Interrupted: a KeyboardInterrupt that says what is kept.
        OtherProcessFailed: a RuntimeError, in the processes beside the one that failed.
    """
    arguments.check_pipeline(pipe)
    arguments.check_call(pipe, call)
    prompts = arguments.check_prompts(pipe, prompts, call)
    arguments.check_keep(keep)
    texts = [prompt_text(prompt, number) for number, prompt in enumerate(prompts)]
    metrics, seeds = arguments.check_asked(
        subjects, texts, metrics=metrics, seeds=seeds, rounds=rounds, show=show, fps=fps, floor=floor
    )
    steps = _steps(pipe, call)
    hosts = {name: _host(name, subject) for name, subject in subjects.items()}
    plans = {name: _resolved(pipe, name, subject, hosts[name], steps) for name, subject in subjects.items()}
    options = {name: _options(subject) for name, subject in subjects.items()}
    clips = [(prompt, seed, text) for prompt, text in zip(prompts, texts, strict=True) for seed in seeds]
    with ExitStack() as opened:
        here = opened.enter_context(processes())
        here.agree("answer whether clips are kept (keep=...)", keep is not None)
        settings: dict[str, Any] = {"rounds": rounds, "metrics": list(metrics), "show": show, "fps": fps}
        settings |= {"processes": here.count, "floor": floor}
        identity = identify(pipe, plans, options, hosts, call=call, prompts=prompts, seeds=seeds, **settings)
        here.agree("comparison", msgspec.to_builtins(identity))
        kept = KeptClips(Path(keep), identity) if keep is not None else None
        done = here.first(partial(_opened, opened, kept, clips)) if kept else {}
        scores = {name: METRICS[name].loaded() for name in metrics}
        films = None
        if not all(METRICS[name].scores_clips for name in metrics):
            films = kept.films if kept else SetFilms(here.first(partial(_scratch, opened)), fps)
        session = _Session(pipe, plans, options, hosts, dict(call), scores, fps, films, floor, here)
        left = [number for number in range(len(clips)) if number not in done]
        try:
            own = left[here.rank :: here.count]
            worst = worst_of_records(done, plans, show)
            with closing(session.clips(clips, own, rounds, worst, progress and here.is_first)) as finished:
                for _ in range(0, len(left), here.count):
                    found = [each for each in here.each(partial(next, finished, None)) if each is not None]
                    done |= dict(found)
                    changed = drop_films(done, worst_of_records(done, plans, show).numbers)
                    numbers = [number for number, _ in found]
                    numbers += sorted(changed.difference(numbers))
                    here.first(partial(_keep, kept, {number: done[number] for number in numbers}))
            # Where a kill came between a clip and the films that it replaced.
            drop_films(done, worst_of_records(done, plans, show).numbers)
            records = [done[number] for number in range(len(clips))]
            sets = here.first(partial(session.set_scores, records))
        except KeyboardInterrupt as stop:
            raise Interrupted(_left(len(done), len(clips), kept)) from stop
    return session.report(records, sets, texts, seeds, rounds, identity, kept if here.is_first else None)


class _Session:
    """The runs of one comparison."""

    def __init__(
        self,
        pipe: Any,
        plans: dict[str, Plan],
        options: dict[str, dict[str, Any]],
        hosts: dict[str, HostUse],
        call: dict[str, Any],
        scores: dict[str, Any],
        fps: int,
        films: SetFilms | None,
        floor: bool,
        here: Processes = ALONE,
    ) -> None:
        """`scores`: by metric, its score function or why there is none. `films`: for metrics of sets, where there are any."""
        self.pipe, self.plans, self.options, self.hosts = pipe, plans, options, hosts
        self.call, self.scores, self.fps, self.films, self.here = call, scores, fps, films, here
        self.beside = (*([FLOOR] if floor else []), *plans)  # what is compared with dense
        self.bar: Callable[[str | None], None]
        self.steps = _steps(pipe, call)
        step_caches = {name: plan.forwards for name, plan in plans.items() if plan.forwards}
        arguments.check_step_caches(step_caches, self.steps)
        for name, forwards in step_caches.items():
            if remark := forwards.idle(self.steps):
                LOG.warning("%s: %s", printable(name), remark)
        self.tokens: dict[str, int] = {}
        self.warmed: dict[str, float] = {}  # ms of the warm-up by subject, until a clip has taken note of it

    def clips(
        self,
        clips: Sequence[tuple[Prompt, int, str]],
        own: Sequence[int],
        rounds: int,
        worst: WorstSoFar,
        progress: bool,
    ) -> Generator[tuple[int, ClipRecord]]:
        """The clips of this process, with their numbers, each as soon as it is finished; with films if it is among the worst of
        those that this process knows."""
        if not own:
            return
        steps = self.steps * (len(own) * (1 + rounds * (1 + len(self.plans)) + (FLOOR in self.beside)) + (0 in own))
        quiet = {**getattr(self.pipe, "_progress_bar_config", {}), "disable": True}
        with attribute(self.pipe, "_progress_bar_config", quiet), _bar(progress, steps) as self.bar:
            self.warm_up(*clips[own[0]][:2])
            for number in own:
                yield number, self.clip(number, *clips[number], rounds, worst)
                self.warmed = {}

    def warm_up(self, prompt: Prompt, seed: int) -> None:
        """A few steps of everything, so that compilation and first allocations fall outside the timed runs, and what cannot
        run at this size is refused before any clip."""
        call = {**self.call, "num_inference_steps": min(WARM_UP_STEPS, self.steps)}
        self.bar("warm-up")
        self.warmed[BASELINE] = generate(self.pipe, prompt, SharedNoise(seed), call).milliseconds
        if FLOOR in self.beside:
            self._warm_up_floor(prompt, seed, call)
        for name, plan in self.plans.items():
            try:
                # A step cache adds nothing to so few steps, and may be made for more; so may one of diffusers.
                host = replace(self.hosts[name], cache=None, parameters={})
                with self._patched(name, replace(plan, forwards=None), host) as patched:
                    self.warmed[name] = generate(self.pipe, prompt, SharedNoise(seed), call).milliseconds
                    layout = patched.layout
                assert layout is not None
                for transformer in plan.models:
                    check_size(plan, transformer, layout)
            except ValueError as error:
                raise ValueError(f"subjects[{quoted(name)}]: {error}") from error
        assert layout is not None
        video = {"frames": layout.frames, "height": layout.height, "width": layout.width}
        self.tokens = {**video, "text": layout.text_tokens}

    def _warm_up_floor(self, prompt: Prompt, seed: int, call: Mapping[str, Any]) -> None:
        with another_kernel(self.pipe):
            try:
                self.warmed[FLOOR] = generate(self.pipe, prompt, SharedNoise(seed), call).milliseconds
            except (RuntimeError, TypeError) as error:
                raise RuntimeError(
                    f"the floor, dense attention in another exact kernel ({self._floor_kernel()}), cannot run here: "
                    f"{str(error)[:300]}. Give floor=False (--no-floor)"
                ) from error

    def _floor_kernel(self) -> str:
        transformer: Any = next(iter(find(self.pipe).values()))[0]
        return describe(device_of(self.pipe), transformer.dtype)

    def clip(self, index: int, prompt: Prompt, seed: int, text: str, rounds: int, worst: WorstSoFar) -> ClipRecord:
        """A dense run, then rounds of a run with each subject and a dense one, in the first of them the floor too; after the
        first clip dense under a patch."""
        noise = SharedNoise(seed)
        seen = {name: Seen() for name in (BASELINE, *self.beside)}
        dense = self._run(BASELINE, prompt, noise, text, seen)
        self._score(seen[BASELINE], dense, None)
        lossless = self._keep_for_sets(BASELINE, index, dense.frames)
        shown, differences = {BASELINE: pixels(dense.frames)} if worst.count else {}, {}
        repeat: list[float] = []
        for number in range(rounds):
            for name in order(self.beside, index * rounds + number):
                if name == FLOOR and number > 0:
                    continue
                run = self._run(name, prompt, noise, text, seen)
                if number == 0:
                    self._score(seen[name], run, dense)
                    lossless |= self._keep_for_sets(name, index, run.frames)
                    if worst.count and name != FLOOR:
                        shown[name] = pixels(run.frames)
                        differences[name] = difference_pixels(dense.frames, run.frames)
            again = self._run(BASELINE, prompt, noise, text, seen)
            repeat.append(largest_difference(dense.frames, again.frames))
        patched, calls = self._dense_attention(prompt, noise, text, seen[BASELINE]) if index == 0 else (None, {})
        numbers = ClipNumbers(
            prompt=text,
            seed=seed,
            shape=dense.frames.shape[:3],
            tokens=self.tokens,
            seen=seen,
            repeat=repeat,
            patch_difference=None if patched is None else largest_difference(dense.frames, patched.frames),
            fps=self.fps,
            warm_up=self.warmed,
            films=lossless,
            dense_calls=calls,
        )
        if not worst.add(index, seen):
            return ClipRecord(numbers)
        films = [{name: each[name] for name in seen if name in each} for each in (shown, differences)]
        return ClipRecord(numbers, *({name: encode(film, self.fps) for name, film in each.items()} for each in films))

    def _score(self, into: Seen, run: PipelineRun, dense: PipelineRun | None) -> None:
        """By each metric that has a value for this run, which is the dense one itself where `dense` is None."""
        frames, latents = (dense.frames, dense.latents) if dense else (None, ())
        for name, score in self.scores.items():
            found = METRICS[name].of_clip(score, run.frames, frames, (run.latents, latents))
            if found is not None:
                into.scores[name] = found

    def _keep_for_sets(self, name: str, index: int, frames: np.ndarray) -> dict[str, str]:
        """The sha256 of its lossless film by subject, where metrics of sets need films and the frames are finite."""
        sha256 = self.films.save(name, index, frames) if self.films else None
        return {name: sha256} if sha256 else {}

    def set_scores(self, records: Sequence[ClipRecord]) -> dict[str, dict[str, Scored]]:
        """By subject, dense included, and metric: the values of all clips together."""
        if self.films is None:
            return {}
        clips, found = [record.numbers for record in records], {}
        for subject in (BASELINE, *self.beside):
            films = self.films.of(subject, clips)
            scored = {name: METRICS[name].of_set(score, films) for name, score in self.scores.items()}
            found[subject] = {name: value for name, value in scored.items() if value is not None}
        return found

    def _dense_attention(
        self, prompt: Prompt, noise: SharedNoise, text: str, seen: Seen
    ) -> tuple[PipelineRun, dict[str, list[int]]]:
        """A dense run, seen through an all-dense patch: attention's share goes into `seen`; how often each layer of each
        transformer was called."""
        self.bar(f"dense under a patch · {text}")
        with patch(self.pipe, "dense") as patched, patched.timed() as timer:
            run = generate(self.pipe, prompt, noise, self.call, lambda: self.bar(None))
        seen.attention.append(timer.attention_ms)
        seen.shares.append(timer.attention_ms / run.milliseconds)
        calls: dict[str, list[int]] = {}
        for row in patched.report().rows:
            calls.setdefault(row["transformer"], []).append(row["calls"])
        return run, calls

    @contextmanager
    def _patched(self, name: str, plan: Plan, host: HostUse) -> Iterator[Patch]:
        """With its attention patched in any case, so that its time is measured."""
        scopes: Patchable = [replace(plan, forwards=None), plan.forwards] if plan.forwards else plan
        with switched_on(self.pipe, host, self.steps), patch(self.pipe, scopes, **self.options[name]) as patched:
            yield patched

    def _run(self, name: str, prompt: Prompt, noise: SharedNoise, text: str, seen: Mapping[str, Seen]) -> PipelineRun:
        self.bar(f"{name} · {text}")
        into = seen[name]
        if name == BASELINE:
            run = generate(self.pipe, prompt, noise, self.call, lambda: self.bar(None))
        elif name == FLOOR:
            with another_kernel(self.pipe) as attached, attached.timed() as timer:
                run = generate(self.pipe, prompt, noise, self.call, lambda: self.bar(None))
            into.attention.append(timer.attention_ms)
            into.shares.append(timer.attention_ms / run.milliseconds)
        else:
            with self._patched(name, self.plans[name], self.hosts[name]) as patched:
                with patched.timed() as timer:
                    run = generate(self.pipe, prompt, noise, self.call, lambda: self.bar(None))
                report = patched.report()  # before the cache is off, of which it says something
            if report.density is None:
                raise RuntimeError(f"{name}: the pipeline ran, but no patched self-attention did; nothing to compare")
            into.attention.append(timer.attention_ms)
            into.shares.append(timer.attention_ms / run.milliseconds)
            into.densities.append(report.density)
            into.layers[:] = [LayerSeen(**row) for row in report.rows]
            into.notes[:] = report.notes
        into.times.append(run.milliseconds)
        into.middles.append(run.middle)
        into.peaks.append(run.peak_bytes)
        return run

    def report(
        self,
        records: Sequence[ClipRecord],
        sets: Mapping[str, Mapping[str, Scored]],
        prompts: list[str],
        seeds: list[int],
        rounds: int,
        identity: Identity,
        kept: KeptClips | None,
    ) -> Report:
        numbers = [record.numbers for record in records]
        clips = tuple(Clip(record.numbers.prompt, record.numbers.seed, record.media) for record in records)
        patch_difference = numbers[0].patch_difference
        if patch_difference is None or not numbers[0].dense_calls:
            raise RuntimeError("expected the first clip to hold a dense run under a patch, found none")
        tallies = {name: SubjectTally.of(name, numbers, sets.get(name, {})) for name in (BASELINE, *self.beside)}
        for name, host in self.hosts.items():
            if host.cache:  # what it leaves out reaches no layer, and so is in no density
                tallies[name] = tallies[name].over(numbers[0].dense_calls, numbers)
        provenance = self._provenance(numbers, prompts, seeds, rounds, identity)
        dense, memory = tallies[BASELINE], memory_kind(self.pipe)
        repeat = [value for clip in numbers for value in clip.repeat]
        rows = [*cost_rows(BASELINE, dense, None, provenance, memory)]
        rows += noise_rows(dense, repeat, patch_difference, provenance)
        rows += warm_up_rows(numbers, provenance)
        rows += quality_rows(BASELINE, dense, None, clips, provenance)
        for name in self.beside:
            several = 1 if name == FLOOR else len(self.plans)
            rows += cost_rows(name, tallies[name], BASELINE, provenance, memory)
            rows += speed_rows(name, tallies[name], dense, clips, provenance, several)
            rows += quality_rows(name, tallies[name], dense, clips, provenance, several)
            if name != FLOOR and FLOOR in tallies:
                rows += floor_rows(name, tallies[name], tallies[FLOOR], dense, clips, provenance, several)
        rows += pair_rows({name: tallies[name] for name in self.plans}, dense, clips, provenance)
        subjects = tuple(
            Subject(name, plan, tallies[name].layers, self.hosts[name].label) for name, plan in self.plans.items()
        )
        return Report(tuple(rows), clips, subjects, provenance, kept)

    def _step_caches(self) -> dict[str, Any]:
        return {name: plan.forwards.to_json() for name, plan in self.plans.items() if plan.forwards}

    def _provenance(
        self, clips: Sequence[ClipNumbers], prompts: list[str], seeds: list[int], rounds: int, identity: Identity
    ) -> dict[str, Any]:
        hosts = {name: host.label for name, host in self.hosts.items() if host.label}
        transformers = {}
        for name, shape in next(iter(self.plans.values())).models.items():
            model = getattr(self.pipe, name)
            kind = {"class": type(model).__name__, "dtype": str(model.dtype).removeprefix("torch.")}
            transformers[name] = {**kind, **asdict(shape)}
        frames, height, width = clips[0].shape
        packages = dict.fromkeys((*DISTRIBUTIONS, *(each for name in self.scores for each in METRICS[name].packages)))
        return {
            "machine": machine(),
            "versions": {**versions(tuple(packages)), **({"revision": sha} if (sha := git_sha()) else {})},
            "pipeline": {
                "class": type(self.pipe).__name__,
                "model": identity.model,
                "weights": identity.weights,
                "components": identity.components,
                "device": str(device_of(self.pipe)),
                "transformers": transformers,
            },
            "call": {key: _plain(value) for key, value in self.call.items()},
            "clip": {"frames": frames, "height": height, "width": width},
            "tokens": clips[0].tokens,
            "prompts": prompts,
            "seeds": seeds,
            "rounds": rounds,
            "order": {
                "seed": ORDER_SEED,
                "first": order(self.beside, 0),
                "then": "turned by one place a clip and round",
            },
            **({FLOOR: self._floor_kernel()} if FLOOR in self.beside else {}),
            **({"forwards": cached} if (cached := self._step_caches()) else {}),
            **({"diffusers": hosts} if hosts else {}),
            **({"processes": self.here.count} if self.here.count > 1 else {}),
            "protocol": protocol(
                self.scores,
                len(clips),
                rounds,
                memory_kind(self.pipe),
                self.here.count,
                shared=device_of(self.pipe).type == "cpu",
                floor=self._floor_kernel() if FLOOR in self.beside else None,
            ),
        }


def largest_difference(a: np.ndarray, b: np.ndarray) -> float:
    """Largest absolute difference of two clips in 0..1; 1 where one of them is not finite."""
    if np.array_equal(a, b):
        return 0.0
    difference = float(np.abs(a - b).max())
    return difference if np.isfinite(difference) else 1.0


def _opened(opened: ExitStack, kept: KeptClips, clips: Sequence[tuple[Prompt, int, str]]) -> dict[int, ClipRecord]:
    """Takes up the folder of a comparison, until it ends; the clips that are in it."""
    opened.enter_context(kept.opened())
    return _finished(kept, clips)


def _scratch(opened: ExitStack) -> Path:
    """A folder that is gone when the comparison ends."""
    return Path(opened.enter_context(TemporaryDirectory()))


def _keep(kept: KeptClips | None, records: Mapping[int, ClipRecord]) -> None:
    if kept:
        for number, record in records.items():
            kept.save(number, record)


def _finished(kept: KeptClips, clips: Sequence[tuple[Prompt, int, str]]) -> dict[int, ClipRecord]:
    """The clips that an earlier start of this comparison has finished, by their numbers."""
    found = {number: kept.load(number, text, seed) for number, (_, seed, text) in enumerate(clips)}
    return {number: record for number, record in found.items() if record is not None}


def _left(done: int, clips: int, kept: KeptClips | None) -> str:
    """What a user who stopped a comparison has of it."""
    if kept is None:
        return "nothing is kept of this comparison: give it a folder to keep its clips in (keep=...)"
    if not done:
        return "no clip was finished yet: the next start begins with the first"
    return f"{done} of {clips} clips are kept in {printable(kept.folder)}; the same comparison, started again, goes on after them"


def _steps(pipe: Any, call: Mapping[str, Any]) -> int:
    stock = inspect.signature(type(pipe).__call__).parameters
    return int(call.get("num_inference_steps", stock["num_inference_steps"].default))


def _parts(subject: PlanLike) -> tuple[HostUse, Any, Mapping[str, Any]]:
    """What of a subject is diffusers', what `patch` takes of it, and its parameters."""
    return apart(*(subject if isinstance(subject, tuple) else (subject, {})))


def _host(name: str, subject: PlanLike) -> HostUse:
    try:
        return _parts(subject)[0]
    except (TypeError, ValueError) as error:
        raise type(error)(f"subjects[{quoted(name)}]: {error}") from error


def _resolved(pipe: Any, name: str, subject: PlanLike, host: HostUse, steps: int) -> Plan:
    """The plan of a subject, read once; what does not fit is refused now, not after the first clip."""
    _, plan, parameters = _parts(subject)
    if plan is None:
        raise TypeError(
            "subjects: expected one plan or method for each, found None, for which patch(pipe) chooses by the size of each call: "
            'name what it says that it takes, such as ("draft", {"density": 0.3, "dense_steps": 0.25, "dense_layers": 1})'
        )
    with patch(pipe, plan, **parameters) as patched:
        found = patched.plan
    try:
        with switched_on(pipe, host, steps):
            return found
    except (TypeError, ValueError, RuntimeError) as error:
        raise type(error)(f"subjects[{quoted(name)}]: {error}") from error


def _options(subject: PlanLike) -> dict[str, Any]:
    """What is not in the plan itself, and so is said again at each patch."""
    parameters = subject[1] if isinstance(subject, tuple) else {}
    return {name: value for name, value in parameters.items() if name in ("cache_memory_fraction", "max_cache")}


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    if isinstance(value, torch.Tensor):
        return f"tensor {list(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    return quoted(value)


@contextmanager
def _bar(shown: bool, steps: int) -> Iterator[Callable[[str | None], None]]:
    """A function that says what runs next, or (None) that a step is done."""
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("steps"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    if shown and not console.is_terminal and not console.is_jupyter:
        yield _lines(console, steps)
        return
    with Progress(*columns, console=console, disable=not shown) as bar:
        task = bar.add_task("warm-up", total=steps)

        def say(what: str | None) -> None:
            if what is None:
                bar.advance(task)
            else:
                bar.update(task, description=_short(what))

        yield say


def _lines(console: Console, steps: int) -> Callable[[str | None], None]:
    """The same for where there is no terminal."""
    lines = ProgressLines(
        steps, lambda text: console.print(text, highlight=False, soft_wrap=True, markup=False, emoji=False)
    )
    done, now = 0, ""

    def say(what: str | None) -> None:
        nonlocal done, now
        done, now = (done + 1, now) if what is None else (done, _short(what))
        lines.tell(done, now)

    return say


def _short(what: str) -> str:
    """In one line, of what fits beside a bar."""
    what = printable(what[:48])
    return what if len(what) < 48 else what[:47] + "…"
