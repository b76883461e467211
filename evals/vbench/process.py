"""Starts VBench's program on one dimension of a set of clips and reads its answer, which is checked clip by clip."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from diffusers_accel.evals.vbench.clips import Clips
from diffusers_accel.evals.vbench.dimensions import FLICKERING
from diffusers_accel.evals.vbench.environment import Environment
from diffusers_accel.evals.vbench.weights import cache_folder
from diffusers_accel.evals.worker_process import Worker
from diffusers_accel.files import quoted

CHILD = Path(__file__).with_name("child.py")


class VBenchFailed(RuntimeError):
    """VBench's program ended without an answer, or with one that cannot be; the message says what it said."""


@dataclass(frozen=True)
class Measured:
    """One dimension.

    score: VBench's own, of all clips together. clips: its score of each by the clip's name. seconds: of the whole process.
    """

    score: float
    clips: Mapping[str, float]
    versions: Mapping[str, str]
    seconds: float


def measure(dimension: str, clips: Clips, environment: Environment, device: str) -> Measured:
    """Runs a dimension; its packages and weights were found to be there before.

    Raises:
        VBenchFailed: as it says.
    """
    begun = time.monotonic()
    filtered = clips.standard and dimension == FLICKERING
    with TemporaryDirectory(prefix="diffusers_accel_vbench_") as scratch:
        videos = Path(scratch, "videos")
        given = _linked(clips, videos)
        job = {
            "dimension": dimension,
            "videos": str(videos),
            "prompts": [] if clips.standard else {name: clips.clips[key].prompt for name, key in given.items()},
            "mode": "vbench_standard" if clips.standard else "custom_input",
            "filter": filtered,
            "device": device,
            "cache": str(cache_folder().absolute()),
            "scratch": scratch,
        }
        versions, result = _answer(job, environment, dimension)
    score, scored = _checked(result, dimension)
    names = {given.get(name, name): value for name, value in scored.items()}
    _check_names(set(names), set(given.values()), dimension, filtered)
    return Measured(score, names, versions, time.monotonic() - begun)


def _linked(clips: Clips, folder: Path) -> dict[str, str]:
    """Fills a folder with links to the clips and nothing else; name of the link -> name of the clip.

    VBench makes prompts, paths and keys of file names, so clips of others get plain ones; its own have to keep theirs.
    """
    folder.mkdir()
    given = {}
    for number, (name, clip) in enumerate(clips.clips.items()):
        link = name if clips.standard else f"{number:06}.mp4"
        (folder / link).symlink_to(clip.path.absolute())
        given[link] = name
    return given


def _answer(job: Mapping[str, Any], environment: Environment, dimension: str) -> tuple[dict[str, str], Any]:
    worker = Worker(job, (str(environment.python), "-I", str(CHILD)))
    versions: dict[str, str] = {}
    held = None
    try:
        while (message := worker.answers.get()) is not None:
            versions = message.get("versions", versions)
            if "result" in message:
                return versions, message["result"]
        raise VBenchFailed(f"{dimension}: VBench's program ended before its answer: {worker.last_words()}")
    finally:
        held = worker.kill()
        if held:
            raise VBenchFailed(held)


def _checked(result: Any, dimension: str) -> tuple[float, dict[str, float]]:
    """Score and scores by file name; raises VBenchFailed where they are no numbers."""
    try:
        score, each = result
        scores = {str(name): float(value) for name, value in each.items()}
        score = float(score)
    except (TypeError, ValueError, AttributeError) as error:
        raise VBenchFailed(
            f"{dimension}: expected VBench's score and those of its clips, found {quoted(result)}"
        ) from error
    wrong = [value for value in (score, *scores.values()) if not math.isfinite(value)]
    if wrong:
        raise VBenchFailed(f"{dimension}: expected finite scores of VBench, found {wrong[0]}")
    return score, scores


def _check_names(scored: set[str], asked: set[str], dimension: str, filtered: bool) -> None:
    """VBench passes over a clip that it cannot read without a word, and its score is then that of the others."""
    if strange := sorted(scored - asked):
        raise VBenchFailed(
            f"{dimension}: expected scores of the clips that were given, found one of {quoted(strange[0])}"
        )
    if (lost := sorted(asked - scored)) and not filtered:
        raise VBenchFailed(
            f"{dimension}: expected a score of each of {len(asked)} clips, found none of {quoted(lost[0])}"
            f"{f' and {len(lost) - 1} more' if len(lost) > 1 else ''}; can the file be played?"
        )
