"""Dense against patched in one run: the same prompts, seeds and noise, speed and quality, clip by clip."""

from __future__ import annotations

import importlib.util
import inspect
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from diffusers_accel.api import patch
from diffusers_accel.evals.generate import (
    Prompt,
    Run,
    SharedNoise,
    attribute,
    check_call,
    device_of,
    generate,
    memory_kind,
    prompt_text,
)
from diffusers_accel.evals.machine import git_sha, machine, versions
from diffusers_accel.evals.metrics import METRICS, Metric, MetricUnavailable, Score, score_clip
from diffusers_accel.evals.report import Clip, Media, Report, Subject
from diffusers_accel.evals.report.video import GAIN, encode, encode_difference
from diffusers_accel.evals.tally import (
    BASELINE,
    WARM_UP_STEPS,
    Tally,
    cost_rows,
    noise_rows,
    protocol,
    quality_rows,
    speed_rows,
)
from diffusers_accel.files import quoted
from diffusers_accel.methods import Method, Recipe
from diffusers_accel.plan import Plan
from diffusers_accel.suggest import did_you_mean

DISTRIBUTIONS = ("torch", "triton", "diffusers", "diffusers-accel", "numpy", "scikit-image", "lpips")
# What a subject may be; a pair gives the parameters of `patch`: of a named method, and max_cache.
Patchable = Plan | Recipe | Method | str | os.PathLike[str]
PlanLike = Patchable | tuple[Patchable, Mapping[str, Any]]


def compare(
    pipe: Any,
    subjects: Mapping[str, PlanLike],
    prompts: Sequence[Prompt],
    *,
    call: Mapping[str, Any],
    seeds: Sequence[int] = (0,),
    metrics: Sequence[str] = tuple(METRICS),
    rounds: int = 1,
    show: int = 4,
    fps: int = 16,
    progress: bool = True,
) -> Report:
    """Measure what patching wins and what it costs, against the same pipeline unpatched.

    Every prompt is run with every seed; each such clip is generated dense, then with each subject, then dense again. The
    pipeline is left as it was found, whatever happens.

    Args:
        pipe: a loaded, unpatched pipeline of a supported family.
        subjects: name -> a Plan, a method's name, a path to a plan file, a Method or Recipe, or (one of these, parameters
            of `patch`), such as ("cached", {"every": 2, "max_cache": 0.5}).
        prompts: texts; or mappings of pipeline arguments, such as prompt_embeds, for a pipeline without a text encoder.
        call: what else the pipeline is called with, such as height, width, num_frames, num_inference_steps, guidance_scale.
        seeds: of the CPU generator that makes the initial noise.
        metrics: names out of `METRICS`. One that cannot be computed here gives rows without value that say why.
        rounds: how many patched runs of each clip are timed, each between two dense ones.
        show: at most so many clips are kept as video for the report's page.
        fps: of those videos.
        progress: show a progress bar.

    Raises:
        ValueError, TypeError: an argument is not as expected, or the pipeline is patched already; before any clip is made.
    """
    if isinstance(prompts, str):
        raise TypeError(f"prompts: expected a list of texts, found one text: give [{prompts!r}]")
    prompts = list(prompts)
    check_call(pipe, call, prompts)
    texts = [prompt_text(prompt, number) for number, prompt in enumerate(prompts)]
    check_asked(subjects, texts, metrics=metrics, seeds=seeds, rounds=rounds, fps=fps)
    plans = {name: _plan(pipe, subject) for name, subject in subjects.items()}
    options = {name: _options(subject) for name, subject in subjects.items()}
    scores = {name: _load(METRICS[name]) for name in metrics}
    session = _Session(pipe, plans, options, dict(call), scores, fps)
    clips = [(prompt, seed, text) for prompt, text in zip(prompts, texts, strict=True) for seed in seeds]
    quiet = {**getattr(pipe, "_progress_bar_config", {}), "disable": True}
    steps = session.steps * session.runs(len(clips), rounds)
    with attribute(pipe, "_progress_bar_config", quiet), _bar(progress, steps) as session.bar:
        session.warm_up(*clips[0][:2])
        for number, (prompt, seed, text) in enumerate(clips):
            session.clip(prompt, seed, rounds, text, media=number < show)
        session.dense_attention(*clips[0][:2])
    return session.report(texts, list(seeds), rounds)


class _Session:
    """The state of one comparison."""

    def __init__(
        self,
        pipe: Any,
        plans: dict[str, Plan],
        options: dict[str, dict[str, Any]],
        call: dict[str, Any],
        scores: dict[str, Score | str],
        fps: int,
    ) -> None:
        self.pipe, self.plans, self.options = pipe, plans, options
        self.call, self.scores, self.fps = call, scores, fps
        self.bar: Callable[[str | None], None]
        stock = inspect.signature(type(pipe).__call__).parameters
        self.steps = int(call.get("num_inference_steps", stock["num_inference_steps"].default))
        self.tallies = {name: Tally() for name in (BASELINE, *plans)}
        self.repeat: list[float] = []
        self.patch_difference = 0.0
        self.clips: list[Clip] = []
        self.first_frames: np.ndarray
        self.tokens: dict[str, Any] = {}

    def runs(self, clips: int, rounds: int) -> int:
        """Full runs; the warm-up is not counted."""
        return clips * (1 + rounds * (1 + len(self.plans))) + 1

    def warm_up(self, prompt: Prompt, seed: int) -> None:
        """A few steps of everything, so that compilation and first allocations fall outside the timed runs."""
        call = {**self.call, "num_inference_steps": min(WARM_UP_STEPS, self.steps)}
        self.bar("warm-up")
        generate(self.pipe, prompt, SharedNoise(seed), call)
        for name, plan in self.plans.items():
            with patch(self.pipe, plan, **self.options[name]) as patched:
                generate(self.pipe, prompt, SharedNoise(seed), call)
                layout = patched.sites[0].layout()
        video = {"frames": layout.frames, "height": layout.height, "width": layout.width}
        self.tokens = {**video, "text": layout.text_tokens}

    def clip(self, prompt: Prompt, seed: int, rounds: int, text: str, media: bool) -> None:
        noise = SharedNoise(seed)
        first = self._run(BASELINE, prompt, noise, text)
        dense = [first.milliseconds]
        times: dict[str, list[float]] = {name: [] for name in self.plans}
        if not self.clips:
            self.first_frames = first.frames
        videos = {BASELINE: encode(first.frames, self.fps)} if media else {}
        differences: dict[str, bytes] = {}
        for number in range(rounds):
            for name in self.plans:
                run = self._run(name, prompt, noise, text)
                times[name].append(run.milliseconds)
                if number == 0:
                    self._score(name, first.frames, run.frames)
                    if media:
                        videos[name] = encode(run.frames, self.fps)
                        differences[name] = encode_difference(first.frames, run.frames, self.fps)
            again = self._run(BASELINE, prompt, noise, text)
            dense.append(again.milliseconds)
            self.repeat.append(largest_difference(first.frames, again.frames))
        for name, found in {BASELINE: dense, **times}.items():
            self.tallies[name].times.append(found)
        self.clips.append(Clip(text, seed, Media(videos, differences, self.fps, GAIN) if media else None))

    def dense_attention(self, prompt: Prompt, seed: int) -> None:
        """Attention's share of a dense run, seen through an all-dense patch; and what that patch changes in the frames."""
        with patch(self.pipe, "dense") as patched, patched.timed() as timer:
            run = generate(self.pipe, prompt, SharedNoise(seed), self.call, lambda: self.bar(None))
        self.tallies[BASELINE].attention.append(timer.attention_ms)
        self.tallies[BASELINE].shares.append(timer.attention_ms / run.milliseconds)
        self.patch_difference = largest_difference(self.first_frames, run.frames)

    def _run(self, name: str, prompt: Prompt, noise: SharedNoise, text: str) -> Run:
        self.bar(f"{name} · {text}")
        tally = self.tallies[name]
        if name == BASELINE:
            run = generate(self.pipe, prompt, noise, self.call, lambda: self.bar(None))
        else:
            with patch(self.pipe, self.plans[name], **self.options[name]) as patched, patched.timed() as timer:
                run = generate(self.pipe, prompt, noise, self.call, lambda: self.bar(None))
            report = patched.report()
            if report.density is None:
                raise RuntimeError(f"{name}: the pipeline ran, but no patched self-attention did; nothing to compare")
            tally.attention.append(timer.attention_ms)
            tally.shares.append(timer.attention_ms / run.milliseconds)
            tally.densities.append(report.density)
            tally.layers = report.rows
        tally.peaks.append(run.peak_bytes)
        return run

    def _score(self, name: str, reference: np.ndarray, frames: np.ndarray) -> None:
        for metric, score in self.scores.items():
            result = score_clip(METRICS[metric], score, reference, frames)
            self.tallies[name].scores.setdefault(metric, []).append(result)

    def report(self, prompts: list[str], seeds: list[int], rounds: int) -> Report:
        provenance = self._provenance(prompts, seeds, rounds)
        dense = self.tallies[BASELINE]
        rows = [*cost_rows(BASELINE, dense, None, provenance, memory_kind(self.pipe))]
        rows += noise_rows(dense, self.repeat, self.patch_difference, provenance)
        for name in self.plans:
            tally = self.tallies[name]
            rows += cost_rows(name, tally, BASELINE, provenance, memory_kind(self.pipe))
            rows += speed_rows(name, tally, dense, self.clips, provenance)
            rows += quality_rows(name, tally, self.clips, provenance)
        subjects = tuple(Subject(name, plan, self.tallies[name].layers) for name, plan in self.plans.items())
        return Report(tuple(rows), tuple(self.clips), subjects, provenance)

    def _provenance(self, prompts: list[str], seeds: list[int], rounds: int) -> dict[str, Any]:
        transformers = {}
        for name, shape in next(iter(self.plans.values())).models.items():
            model = getattr(self.pipe, name)
            kind = {"class": type(model).__name__, "dtype": str(model.dtype).removeprefix("torch.")}
            transformers[name] = {**kind, **asdict(shape)}
        frames, height, width, _ = self.first_frames.shape
        return {
            "machine": machine(),
            "versions": {**versions(DISTRIBUTIONS), **({"revision": sha} if (sha := git_sha()) else {})},
            "pipeline": {
                "class": type(self.pipe).__name__,
                "device": str(device_of(self.pipe)),
                "transformers": transformers,
            },
            "call": {key: _plain(value) for key, value in self.call.items()},
            "clip": {"frames": frames, "height": height, "width": width},
            "tokens": self.tokens,
            "prompts": prompts,
            "seeds": seeds,
            "rounds": rounds,
            "protocol": protocol(self.scores, len(self.clips), rounds, memory_kind(self.pipe)),
        }


def largest_difference(a: np.ndarray, b: np.ndarray) -> float:
    """Largest absolute difference of two clips in 0..1; 1 where one of them is not finite."""
    if np.array_equal(a, b):
        return 0.0
    difference = float(np.abs(a - b).max())
    return difference if np.isfinite(difference) else 1.0


def _check_installed() -> None:
    """Refuses before the first clip what would otherwise fail after the last."""
    needed = ("imageio_ffmpeg", "jinja2", "matplotlib", "psutil", "scipy", "skimage")
    if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
        raise ImportError(f"a report needs {', '.join(missing)}, found none: pip install 'diffusers-accel[eval]'")


def check_asked(
    subjects: Mapping[str, PlanLike],
    texts: Sequence[str],
    *,
    metrics: Sequence[str],
    seeds: Sequence[int],
    rounds: int,
    fps: int = 16,
) -> None:
    """What `compare` refuses without a pipeline; `texts` are those of its prompts."""
    _check_installed()
    if len(set(texts)) != len(texts):
        raise ValueError(
            f"prompts: expected each once (`seeds` gives several clips of one), found {quoted(list(texts))}"
        )
    if not subjects:
        raise ValueError('subjects: expected one or more, such as {"plan": "plan.json"}, found none')
    seen: dict[str, str] = {}
    for name in subjects:
        key = " ".join(str(name).split()).casefold()
        if not isinstance(name, str) or not key:
            raise ValueError(f"subjects: expected names with letters in them, found {name!r}")
        if key == BASELINE:
            raise ValueError(f"subjects: {name!r} is the baseline's name; give the subject another")
        if key in seen:
            raise ValueError(
                f"subjects: {seen[key]!r} and {name!r} would look the same in a table; give each its own name"
            )
        seen[key] = name
    for metric in metrics:
        if metric not in METRICS:
            raise ValueError(
                f"metrics: expected some of {', '.join(METRICS)}, found {quoted(metric)}{did_you_mean(metric, METRICS)}"
            )
    if len(set(metrics)) != len(metrics):
        raise ValueError(f"metrics: expected each once, found {list(metrics)}")
    if not seeds or len(set(seeds)) != len(seeds) or not all(isinstance(seed, int) for seed in seeds):
        raise ValueError(f"seeds: expected one or more different whole numbers, found {quoted(list(seeds))}")
    if rounds < 1 or fps < 1:
        raise ValueError(f"rounds and fps: expected 1 or more, found {rounds} and {fps}")


def _plan(pipe: Any, subject: PlanLike) -> Plan:
    """The plan of a subject, read once; one that does not fit is refused now, not after the first clip."""
    plan, parameters = subject if isinstance(subject, tuple) else (subject, {})
    with patch(pipe, plan, **parameters) as patched:
        return patched.plan


def _options(subject: PlanLike) -> dict[str, Any]:
    """What is not in the plan itself, and so is said again at each patch."""
    parameters = subject[1] if isinstance(subject, tuple) else {}
    return {name: value for name, value in parameters.items() if name == "max_cache"}


def _load(metric: Metric) -> Score | str:
    """The score function, or why there is none."""
    try:
        return metric.load()
    except MetricUnavailable as reason:
        return str(reason)


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    if isinstance(value, torch.Tensor):
        return f"tensor {list(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    return repr(value)


@contextmanager
def _bar(shown: bool, steps: int) -> Iterator[Callable[[str | None], None]]:
    """A function that says what runs next, or (None) that a step is done."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("steps"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), disable=not shown) as bar:
        task = bar.add_task("warm-up", total=steps)

        def say(what: str | None) -> None:
            if what is None:
                bar.advance(task)
            else:
                bar.update(task, description=what if len(what) <= 48 else what[:47] + "…")

        yield say
