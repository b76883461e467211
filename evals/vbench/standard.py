"""The clips that VBench asks for: its own prompts, five films of each and 25 of those for flickering, made with resumption.

The prompts are those that the `vbench` package in VBench's environment brings, checked by their sha256.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from diffusers_accel.api import patch
from diffusers_accel.evals.generate import SharedNoise, generate
from diffusers_accel.evals.host_use import HostUse
from diffusers_accel.evals.kept import Identity, identify
from diffusers_accel.evals.report.video import encode_lossless
from diffusers_accel.evals.vbench.clips import FILM, Clips, Film
from diffusers_accel.evals.vbench.dimensions import FLICKERING
from diffusers_accel.evals.vbench.environment import PROGRAM, Environment
from diffusers_accel.evals.vbench.results import SAMPLES
from diffusers_accel.files import (
    FileError,
    Kind,
    Schema,
    convert,
    load_document,
    only_writer,
    parse_json,
    prepare_folder,
    printable,
    quoted,
    read_bytes,
    save_document,
    write_whole,
)
from diffusers_accel.support.interrupted import Interrupted

KIND = Kind("diffusers_accel.vbench_clips", version=1, remedy="delete its folder to generate again, or name another")
MADE = "clips.json"
PROMPTS_SHA256 = "5dd2de80ee43cda750b2b72ea7023657c0b90d3702041c7e4608c65dbe50dccd"
MOST_BYTES = 2**20
FLICKERING_FACTOR = 5  # as many clips more of each prompt, of which VBench keeps still ones


@dataclass(frozen=True)
class StandardPrompt:
    """A prompt, and the dimensions that are measured on its clips."""

    text: str
    dimensions: frozenset[str]

    def count(self, samples: int) -> int:
        return samples * (FLICKERING_FACTOR if FLICKERING in self.dimensions else 1)


@dataclass(frozen=True)
class AskedClip:
    """A clip that VBench asks for; `name` is the file's."""

    name: str
    prompt: str
    seed: int


class ClipsMark(Schema, frozen=True):
    """What the clips of a folder have in common: they may not be mixed with those of another pipeline or plan."""

    identity: Identity
    seed: int


def read_prompts(environment: Environment) -> list[StandardPrompt]:
    """VBench's prompts, each once, in its order.

    Raises:
        FileError: the file is not the published one.
    """
    path = environment.folder / "lib" / PROGRAM / "site-packages" / "vbench" / "VBench_full_info.json"
    data = read_bytes(path, MOST_BYTES, "the prompts of VBench")
    if (found := hashlib.sha256(data).hexdigest()) != PROMPTS_SHA256:
        raise FileError(f"{printable(path)}: expected the published prompts, sha256 {PROMPTS_SHA256}, found {found}")
    return parse_prompts(data)


def parse_prompts(data: bytes) -> list[StandardPrompt]:
    """Two prompts are in VBench's list twice, for one dimension each; their clips have one name, and so are the same."""
    found: dict[str, set[str]] = {}
    for each in convert(parse_json(data), list[dict[str, Any]]):
        found.setdefault(each["prompt_en"], set()).update(each["dimension"])
    return [StandardPrompt(text, frozenset(dimensions)) for text, dimensions in found.items()]


def asked_clips(
    prompts: Sequence[StandardPrompt], dimensions: Sequence[str], samples: int = SAMPLES, seed: int = 0
) -> list[AskedClip]:
    """The clips that these dimensions are measured on. Each of VBench's clips has its own seed, whichever are asked for."""
    most = SAMPLES * FLICKERING_FACTOR
    return [
        AskedClip(f"{prompt.text}-{index}{FILM}", prompt.text, seed + number * most + index)
        for number, prompt in enumerate(prompts)
        if prompt.dimensions & set(dimensions)
        for index in range(prompt.count(samples))
    ]


def read_clips(folder: Path, prompts: Sequence[StandardPrompt], asked: Sequence[AskedClip], samples: int) -> Clips:
    """The clips of a folder that are asked for.

    Raises:
        FileError: one is missing.
    """
    of_prompt = {prompt.text: prompt.dimensions for prompt in prompts}
    if lost := [each.name for each in asked if not (folder / each.name).is_file()]:
        raise FileError(
            f"{printable(folder)}: expected {len(asked):,} clips, found {len(asked) - len(lost):,}; {quoted(lost[0])} is "
            "missing. Generate them with --standard"
        )
    found = {each.name: Film(folder / each.name, each.prompt, of_prompt[each.prompt]) for each in asked}
    return Clips(found, True, samples)


def make_clips(
    pipe: Any,
    asked: Sequence[AskedClip],
    folder: Path,
    *,
    call: Mapping[str, Any],
    subject: Any = None,
    seed: int = 0,
    fps: int = 16,
    say: Callable[[str], None] = print,
) -> None:
    """Generates the clips that are not there yet, each written whole, lossless (H.264, RGB of 8 bits).

    Args:
        call: what else the pipeline is called with.
        subject: what `patch` takes, or (that, its parameters); None leaves the pipeline as it is.
        seed: what `asked_clips` was given.

    Raises:
        FileError: the folder holds clips of another pipeline, plan or call, or somebody else writes into it.
        RuntimeError: the frames of a clip are not finite.
        Interrupted: a KeyboardInterrupt that says what is kept.
    """
    prepare_folder(folder)
    with only_writer(folder / MADE, "another run generates into this folder"), _patched(pipe, subject) as plans:
        _begin(folder, ClipsMark(identity=_identity(pipe, plans, call, fps), seed=seed))
        left = [each for each in asked if not (folder / each.name).is_file()]
        done = len(asked) - len(left)
        try:
            for each in left:
                say(f"clip {done + 1} of {len(asked)}: {each.name}")
                frames = generate(pipe, each.prompt, SharedNoise(each.seed), call).frames
                if not np.isfinite(frames).all():
                    raise RuntimeError(f"{printable(each.name)}: the frames hold NaN or infinite values")
                write_whole(folder / each.name, encode_lossless(frames, fps))
                done += 1
        except KeyboardInterrupt as stop:
            raise Interrupted(
                f"{done} of {len(asked)} clips are kept in {printable(folder)}; the same run, started again, goes on after them"
            ) from stop


@contextlib.contextmanager
def _patched(pipe: Any, subject: Any) -> Iterator[dict[str, Any]]:
    """The pipeline under the subject; its plan by name, as `identify` takes it."""
    if subject is None:
        yield {}
        return
    plan, parameters = subject if isinstance(subject, tuple) else (subject, {})
    with patch(pipe, plan, **parameters) as patched:
        yield {"plan": patched.plan}


def _identity(pipe: Any, plans: Mapping[str, Any], call: Mapping[str, Any], fps: int) -> Identity:
    nothing: dict[str, Any] = {"prompts": [], "seeds": [], "rounds": 1, "metrics": [], "show": 0}
    return identify(
        pipe, plans, dict.fromkeys(plans, {}), dict.fromkeys(plans, HostUse()), call=call, fps=fps, **nothing
    )


def _begin(folder: Path, made: ClipsMark) -> None:
    """Marks the folder, or makes sure that its clips are of the same kind."""
    try:
        found = load_document(folder / MADE, KIND, ClipsMark)
    except FileNotFoundError:
        others = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
        if others:
            raise FileError(
                f"{printable(folder)}: holds other files ({printable(others[0])[:60]}) and no {MADE}; name another folder"
            ) from None
        save_document(folder / MADE, KIND, made)
        return
    theirs, mine = (_flat(each) for each in (found, made))
    if differing := [key for key in mine if mine[key] != theirs[key]]:
        key = differing[0]
        raise FileError(
            f"{printable(folder)}: keeps clips with {key} {quoted(theirs[key])[:120]}, this run has {quoted(mine[key])[:120]}: "
            "they cannot be mixed. Name another folder, or delete this one"
        )


def _flat(made: ClipsMark) -> dict[str, Any]:
    plain = msgspec.to_builtins(made)
    return {**plain["identity"], "seed": plain["seed"]}
