"""What `compare` is called with, checked before anything runs: what was expected, what was found, what to do."""

from __future__ import annotations

import importlib.util
import inspect
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from diffusers import DiffusionPipeline
from torch import nn

from diffusers_accel.evals.generate import RESERVED, Prompt
from diffusers_accel.evals.metrics import METRICS
from diffusers_accel.evals.report.findings import FLOOR
from diffusers_accel.evals.tally import BASELINE
from diffusers_accel.extras import install
from diffusers_accel.families import find
from diffusers_accel.files import FileError, check_json, printable, quoted
from diffusers_accel.forwards import Forwards
from diffusers_accel.support.suggest import did_you_mean

KEPT_NAMES = {BASELINE: "baseline", FLOOR: "floor"}
LONGEST_NAME, LONGEST_PROMPT = 100, 10_000  # characters
LARGEST_SEED = 2**63 - 1
MOST_ROWS = 25_000  # in 16 MiB of JSON, what stands beside the numbers included
MOST_TOLD = 4 * 2**20  # bytes of prompts in a report, of the 16 MiB that it may have


def check_asked(
    subjects: Any,
    texts: Sequence[str],
    *,
    metrics: Any,
    seeds: Any,
    rounds: Any,
    show: Any = 4,
    fps: Any = 16,
    floor: Any = True,
) -> tuple[tuple[str, ...], list[int]]:
    """All that can be said before a pipeline is loaded; `texts` are those of its prompts.

    Returns:
        The metrics and the seeds, as tuple and list.
    """
    check_installed()
    check_subjects(subjects)
    metrics, seeds = check_metrics(metrics), check_seeds(seeds)
    for name, value, least in (("rounds", rounds, 1), ("show", show, 0), ("fps", fps, 1)):
        check_whole(name, value, least)
    if not isinstance(floor, bool):
        raise TypeError(f"floor: expected True or False, found {quoted(floor)}")
    for number, text in enumerate(texts):
        _check_text(text, f"prompts[{number}]")
    check_clips(texts, seeds, len(subjects), metrics, floor)
    return metrics, seeds


def check_installed() -> None:
    """Refuses before the first clip what would otherwise fail after the last."""
    needed = ("imageio_ffmpeg", "jinja2", "matplotlib", "psutil", "scipy")
    if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
        raise ImportError(f"a report needs {', '.join(missing)}, found none: {install('eval')}")


def check_pipeline(pipe: Any) -> None:
    """Refuses what is no whole pipeline, such as its transformer."""
    if isinstance(pipe, nn.Module):
        raise TypeError(
            f"pipe: expected a whole diffusers pipeline, found a bare {type(pipe).__name__}: give the pipeline that it is part of"
        )
    if not isinstance(pipe, DiffusionPipeline):
        raise TypeError(
            f"pipe: expected a loaded diffusers pipeline, such as a WanPipeline, found {type(pipe).__name__}"
        )
    for name, (module, _) in find(pipe).items():
        if getattr(module, "_parallel_config", None) is not None:
            raise ValueError(
                f"{name} shares each sequence with other processes, among which a comparison deals its clips: compare with a "
                "pipeline that is not parallel, in one process or several, and run the plan in parallel afterwards"
            )


def check_subjects(subjects: Any) -> None:
    """Refuses what is no mapping of names, and names that a table could not tell apart."""
    if not isinstance(subjects, Mapping):
        raise TypeError(
            f'subjects: expected a mapping of names, such as {{"draft": "draft"}} or {{"plan": "plan.json"}}, found '
            f"{quoted(subjects)}"
        )
    if not subjects:
        raise ValueError('subjects: expected one or more, such as {"plan": "plan.json"}, found none')
    seen: dict[str, str] = {}
    for name, subject in subjects.items():
        key = " ".join(printable(name).split()).casefold()
        if not isinstance(name, str) or not key:
            raise ValueError(f"subjects: expected names with letters in them, found {quoted(name)}")
        if len(name) > LONGEST_NAME:
            raise ValueError(f"subjects: expected names of at most {LONGEST_NAME} characters, found {quoted(name)}")
        if key in (BASELINE, FLOOR):
            raise ValueError(f"subjects: {quoted(name)} is the {KEPT_NAMES[key]}'s name; give the subject another")
        if key in seen:
            raise ValueError(
                f"subjects: {quoted(seen[key])} and {quoted(name)} would look the same in a table; give each its own name"
            )
        seen[key] = name
        _check_subject(name, subject)
    _check_plain(list(subjects), "subjects")


def check_prompts(pipe: Any, prompts: Any, call: Mapping[str, Any]) -> list[Prompt]:
    """The prompts as a list, each a text or a mapping of arguments that the pipeline takes."""
    if isinstance(prompts, str):
        raise TypeError(f"prompts: expected a list of texts, found one text: give [{quoted(prompts)}]")
    if isinstance(prompts, Mapping) or not isinstance(prompts, Iterable):
        raise TypeError(f"prompts: expected a list of texts, found {quoted(prompts)}")
    prompts = list(prompts)
    if not prompts:
        raise ValueError("prompts: expected one or more, found none")
    free = _accepted(pipe) - set(call) - set(RESERVED) | {"prompt", "prompt_embeds"}
    for number, prompt in enumerate(prompts):
        text = prompt.get("prompt") if isinstance(prompt, Mapping) else prompt
        if isinstance(text, str):
            _check_text(text, f"prompts[{number}]")
        if not isinstance(prompt, str) and (not isinstance(prompt, Mapping) or not prompt or not set(prompt) <= free):
            found = sorted(map(str, prompt)) if isinstance(prompt, Mapping) else quoted(prompt)
            raise ValueError(
                f"prompts[{number}]: expected a string, or a mapping of arguments of {type(pipe).__name__} that are not in "
                f"call (such as prompt_embeds), found {found}"
            )
    return prompts


def check_call(pipe: Any, call: Any) -> None:
    """Refuses keys that the pipeline does not take or that a report sets itself, and what no report could hold."""
    if not isinstance(call, Mapping):
        raise TypeError(
            f"call: expected a mapping of arguments of the pipeline, such as dict(height=480, width=832, num_frames=81), "
            f"found {quoted(call)}"
        )
    accepted = _accepted(pipe)
    for key, value in call.items():
        if key in RESERVED:
            raise ValueError(f"call: {key!r} is set by compare; {RESERVED[key]}")
        if key not in accepted:
            known = sorted(accepted - set(RESERVED))
            raise ValueError(
                f"call: {type(pipe).__name__} takes no {quoted(key)}; it takes {', '.join(known)}{did_you_mean(str(key), known)}"
            )
        if isinstance(value, (str, int, float)):
            _check_plain(value, f"call: {key}")
    if "num_inference_steps" in call:
        check_whole("call: num_inference_steps", call["num_inference_steps"], 1)


def check_metrics(metrics: Any) -> tuple[str, ...]:
    """The names as a tuple."""
    if isinstance(metrics, str) or not isinstance(metrics, Iterable):
        raise TypeError(f'metrics: expected a list of names, such as ["psnr", "ssim"], found {quoted(metrics)}')
    metrics = tuple(metrics)
    for metric in metrics:
        if not isinstance(metric, str) or metric not in METRICS:
            raise ValueError(
                f"metrics: expected some of {', '.join(METRICS)}, found {quoted(metric)}{did_you_mean(str(metric), METRICS)}"
            )
    if len(set(metrics)) != len(metrics):
        raise ValueError(f"metrics: expected each once, found {quoted(list(metrics))}")
    return metrics


def check_seeds(seeds: Any) -> list[int]:
    """The seeds as a list of different whole numbers."""
    if isinstance(seeds, (str, bytes, Mapping)) or not isinstance(seeds, Iterable):
        raise TypeError(f"seeds: expected a list of whole numbers, such as [0, 1], found {quoted(seeds)}")
    seeds = list(seeds)
    whole = all(type(seed) is int and 0 <= seed <= LARGEST_SEED for seed in seeds)
    if not seeds or not whole or len(set(seeds)) != len(seeds):
        raise ValueError(
            f"seeds: expected one or more different whole numbers from 0 to 2^63 - 1, found {quoted(seeds)}"
        )
    return seeds


def check_whole(name: str, value: Any, least: int, most: int = 10_000) -> None:
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{name}: expected a whole number from {least} to {most:,}, found {quoted(value)}")


def check_step_caches(step_caches: Mapping[str, Forwards], steps: int) -> None:
    """Refuses those of subjects, by name, that do not fit a call of so many steps."""
    for name, forwards in step_caches.items():
        try:
            forwards.rule.check(steps)
        except ValueError as error:
            raise ValueError(f"subjects[{quoted(name)}]: {error}") from error


def check_keep(keep: Any) -> None:
    if keep is not None and not isinstance(keep, (str, os.PathLike)):
        raise TypeError(f'keep: expected the path of a folder, such as "report.partial", or None, found {quoted(keep)}')


def check_clips(texts: Sequence[str], seeds: Sequence[int], subjects: int, metrics: Sequence[str], floor: bool) -> None:
    """Refuses prompts that a table could not tell apart, and more clips than one report can hold."""
    twice = next((text for text in texts if texts.count(text) > 1), None)
    if twice is not None:
        raise ValueError(
            f"prompts: expected each once (`seeds` gives several clips of one), found {quoted(twice)} {texts.count(twice)} times"
        )
    told = sum(len(text.encode()) for text in texts) * (
        1 + len(seeds)
    )  # by each clip, and by what the report says of itself
    if told > MOST_TOLD:
        raise ValueError(
            f"prompts: expected at most {MOST_TOLD:,} bytes of text with all seeds, found {told:,}: compare fewer clips at once"
        )
    clips = len(texts) * len(seeds)
    of_clips = [METRICS[name] for name in metrics if METRICS[name].scores_clips]
    of_dense = sum(metric.scores_dense for metric in of_clips)
    pairs = subjects * (subjects - 1) // 2 * (1 + len(of_clips))
    rows = clips * ((subjects + floor) * (2 + len(of_clips)) + of_dense) + pairs
    if rows > MOST_ROWS:
        more = f", and {clips:,} x {of_dense} of dense" if of_dense else ""
        more += f", and {pairs:,} of pairs of subjects" if pairs else ""
        raise ValueError(
            f"expected at most {MOST_ROWS:,} numbers in one report, found {rows:,} ({clips:,} clips x "
            f"{subjects} subjects{' and the floor' if floor else ''} x {2 + len(of_clips)}{more}): compare fewer clips or "
            "subjects at once"
        )


def _check_subject(name: str, subject: Any) -> None:
    if not isinstance(subject, tuple):
        return
    if len(subject) != 2 or not isinstance(subject[1], Mapping):
        raise TypeError(
            f"subjects[{quoted(name)}]: expected (what patch takes, its parameters), such as "
            f'("draft", {{"density": 0.3}}), found {quoted(subject)}'
        )


def _accepted(pipe: Any) -> set[str]:
    return set(inspect.signature(type(pipe).__call__).parameters) - {"self"}


def _check_text(text: str, where: str) -> None:
    if not text.strip():
        raise ValueError(f"{where}: expected text, found an empty string")
    if len(text) > LONGEST_PROMPT:
        raise ValueError(f"{where}: expected at most {LONGEST_PROMPT:,} characters, found {quoted(text)}")
    _check_plain(text, where)


def _check_plain(value: Any, where: str) -> None:
    """Refuses what JSON, and so the report, could not hold; now, and not after the last clip."""
    try:
        check_json(value, where)
    except FileError as error:
        raise ValueError(str(error)) from error
