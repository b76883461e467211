"""Measures a set of clips, a dimension at a time; what is measured stays, and the same run started again goes on after it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from diffusers_accel.evals.vbench.clips import Clips, clips_of
from diffusers_accel.evals.vbench.dimensions import CUSTOM, DIMENSIONS, check_dimensions, weights_of
from diffusers_accel.evals.vbench.environment import Environment
from diffusers_accel.evals.vbench.process import measure
from diffusers_accel.evals.vbench.results import DIMENSION, KIND, RESULT, DimensionResult, Result
from diffusers_accel.evals.vbench.weights import WEIGHTS, faults_of, required
from diffusers_accel.files import (
    FileError,
    load_document,
    only_writer,
    prepare_folder,
    printable,
    save_document,
)
from diffusers_accel.support.interrupted import Interrupted

MOST_BYTES = 8 * 2**20  # of names, prompts and numbers in a result, half of what a file may have
NEEDS = "diffusers-accel vbench show"
NUMBER_BYTES = 40  # of a score, with what stands around it


class VBenchLacks(FileError):
    """Something that dimensions need is not there; the message says what, and what to do."""


def check_ready(
    dimensions: Sequence[str] | None, environment: Environment, *, standard: bool, skip: bool = False
) -> tuple[tuple[str, ...], dict[str, str]]:
    """The dimensions that will be measured, and those that will not, with the reason. Weights are looked at, and read whole
    where their sha256 is published.

    Args:
        dimensions: names; None for all that such clips can have.
        skip: whether dimensions that lack something are left out.

    Raises:
        ValueError: a name is none, or not for such clips.
        VBenchLacks: something is missing, and `skip` is false or it is so of all of them.
    """
    every = tuple(DIMENSIONS) if standard else CUSTOM
    asked = check_dimensions(every if dimensions is None else dimensions, standard=standard)
    if not asked:
        raise ValueError("dimensions: expected one or more, found none")
    lacks = lacking(asked, environment, standard=standard)
    ready = tuple(name for name in asked if name not in lacks)
    if lacks and not (skip and ready):
        raise VBenchLacks(_missing_text(lacks, asked, standard))
    return ready, {name: ", ".join(each) for name, each in lacks.items()}


def lacking(dimensions: Sequence[str], environment: Environment, *, standard: bool) -> dict[str, list[str]]:
    """Dimension -> what it lacks, in a few words each; those that lack nothing are left out."""
    faults, found = faults_of(dimensions, standard=standard), {}
    for name in dimensions:
        packages = environment.lacks(name)
        lost = [WEIGHTS[each].title for each in weights_of(name, standard=standard) if each in faults]
        if packages or lost:
            found[name] = [*([packages] if packages else []), *lost]
    return found


def _missing_text(lacks: Mapping[str, Sequence[str]], asked: Sequence[str], standard: bool) -> str:
    """The first of what is missing in full, and where the rest is told."""
    (first, what), faults = next(iter(lacks.items())), list(faults_of(asked, standard=standard).values())
    ready = ", ".join(name for name in asked if name not in lacks) or "none"
    detail = what[0] if not faults else faults[0]
    return (
        f"VBench: {len(lacks)} of {len(asked)} dimensions lack something, such as {first}: {detail}. All of it: "
        f"{NEEDS}. Or leave them out (--skip-missing); ready: {ready}"
    )


def check_size(clips: Clips) -> None:
    """Refuses more clips than a result could hold, before the first is measured."""
    each = sum(len(name.encode()) + NUMBER_BYTES for name in clips.clips)
    size = each * (1 + len(DIMENSIONS)) + sum(len(clip.prompt.encode()) for clip in clips.clips.values())
    if size > MOST_BYTES and not clips.standard:
        raise FileError(
            f"clips: expected names and prompts of at most {MOST_BYTES:,} bytes with their scores, found {size:,} of "
            f"{len(clips.clips):,} clips: measure fewer at once"
        )


def run(
    clips: Clips,
    dimensions: Sequence[str],
    out: Path,
    environment: Environment,
    device: str,
    *,
    left_out: Mapping[str, str] | None = None,
    say: Callable[[str], None] = print,
) -> Result:
    """Measures dimensions of a set of clips and writes `out`/vbench.json.

    Args:
        dimensions: what `check_ready` gave.
        out: a folder; each dimension has a file of its own in it as soon as it is measured.
        say: told what runs.

    Raises:
        FileError: another set of clips was measured into `out`, or somebody else measures into it.
        VBenchFailed: VBench's program could not.
        Interrupted: a KeyboardInterrupt that says what is kept.
    """
    check_size(clips)
    prepare_folder(out)
    digest, found = clips.digest(), {}
    with only_writer(out / RESULT, "another run measures into this folder"):
        kept = {name: _kept(out, name, digest, environment, clips.standard) for name in dimensions}
        try:
            for number, name in enumerate(dimensions):
                if (result := kept[name]) is None:
                    say(f"VBench {number + 1} of {len(dimensions)}: {name}")
                    result = _measured(name, clips, digest, environment, device)
                    save_document(_path(out, name), DIMENSION, result)
                found[name] = result
        except KeyboardInterrupt as stop:
            raise Interrupted(
                f"{len(found)} of {len(dimensions)} dimensions are kept in {printable(out)}; the same run, started again, "
                "goes on after them"
            ) from stop
        told = {name: clip.prompt for name, clip in clips.clips.items()}
        whole = Result(
            standard=clips.standard,
            samples=clips.samples,
            clips=told,
            dimensions=found,
            left_out=dict(left_out or {}),
        )
        save_document(out / RESULT, KIND, whole)
    return whole


def _measured(name: str, clips: Clips, digest: str, environment: Environment, device: str) -> DimensionResult:
    of_it = clips_of(name, clips)
    measured = measure(name, of_it, environment, device)
    return DimensionResult(
        dimension=name,
        score=measured.score,
        clips=dict(measured.clips),
        weights=required(name, standard=clips.standard),
        versions=dict(measured.versions),
        device=device,
        seconds=measured.seconds,
        clips_digest=digest,
        requirements=environment.made.requirements,
    )


def _path(out: Path, dimension: str) -> Path:
    return out / f"{dimension}.json"


def _kept(out: Path, name: str, digest: str, environment: Environment, standard: bool) -> DimensionResult | None:
    """A dimension that was measured before, of these very clips, by the same program and weights; or None."""
    path = _path(out, name)
    try:
        found = load_document(path, DIMENSION, DimensionResult)
    except FileNotFoundError:
        return None
    asked = {
        "clips": (found.clips_digest, digest),
        "packages": (found.requirements, environment.made.requirements),
        "weights": (found.weights, required(name, standard=standard)),
        "dimension": (found.dimension, name),
    }
    if other := [what for what, (theirs, mine) in asked.items() if theirs != mine]:
        raise FileError(
            f"{printable(path)}: holds the score of other {' and '.join(other)} than those of this run, and the two cannot be "
            "mixed: name another folder with --out, or delete this one"
        )
    return found
