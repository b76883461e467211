"""A folder in which a comparison keeps each clip that is finished, so that an interrupted one goes on where it stopped."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

from diffusers_accel.evals.clip_record import KIND as CLIP
from diffusers_accel.evals.clip_record import ClipRecord
from diffusers_accel.evals.host_use import HostUse
from diffusers_accel.evals.machine import git_sha, machine, versions
from diffusers_accel.evals.metrics import METRICS
from diffusers_accel.evals.report.findings import FLOOR
from diffusers_accel.evals.set_films import SetFilms
from diffusers_accel.evals.tally import BASELINE
from diffusers_accel.families import find
from diffusers_accel.files import (
    FileError,
    Kind,
    Schema,
    WriteError,
    checksum,
    load_document,
    only_writer,
    prepare_folder,
    printable,
    quoted,
    save_document,
)
from diffusers_accel.plan import Plan
from diffusers_accel.plan import file as plan_file
from diffusers_accel.support.identity import components, fingerprint, model_name, plain

KIND = Kind("diffusers_accel.comparison", version=1, remedy="delete its folder to measure again, or name another")
RUN, LOCK, FILMS = "comparison.json", ".comparison.json.lock", "films"
CLIPS = "clip-*.safetensors"
WHICH = ("torch", "triton", "diffusers", "diffusers-accel")


class Identity(Schema, frozen=True):
    """What makes two comparisons the same, so that one may go on with the clips of the other.

    prompts: texts, or hashes of what stands in their place. subjects: name -> hash of the plan, its parameters and
    what of diffusers is on.
    processes: how many measured side by side, which times depend on. floor: whether there is one.
    """

    pipeline: str
    model: str
    weights: str
    components: str
    device: str
    versions: dict[str, str]
    call: dict[str, Any]
    prompts: list[Any]
    seeds: list[int]
    subjects: dict[str, str]
    rounds: int
    metrics: list[str]
    show: int
    fps: int
    processes: int = 1
    floor: bool = False


def identify(
    pipe: Any,
    plans: Mapping[str, Plan],
    options: Mapping[str, Mapping[str, Any]],
    hosts: Mapping[str, HostUse],
    *,
    call: Mapping[str, Any],
    prompts: list[Any],
    **settings: Any,
) -> Identity:
    """The identity of a comparison on this machine; `settings` are its other fields, as `compare` takes them."""
    here, found = machine(), find(pipe)
    cuda = torch.device(pipe._execution_device).type == "cuda"
    return Identity(
        pipeline=type(pipe).__name__,
        model=model_name(pipe),
        weights=fingerprint(found),
        components=components(pipe, found),
        device=here["gpu"] if cuda else f"{here['cpu']}, {here['torch_threads']} threads",
        versions={**versions(WHICH), **({"revision": sha} if (sha := git_sha()) else {})},
        call=plain(call),
        prompts=plain(prompts),
        subjects={name: _digest(plan, options[name], hosts[name]) for name, plan in plans.items()},
        **settings,
    )


@dataclass(frozen=True)
class KeptClips:
    """The clips of one comparison in a folder."""

    folder: Path
    identity: Identity

    @contextlib.contextmanager
    def opened(self) -> Iterator[None]:
        """Makes the folder, or takes up the comparison in it; nobody else writes into it meanwhile.

        Raises:
            FileError: another comparison is kept there, or runs; the message says what differs and what to do.
            WriteError: it cannot be written, or holds other files.
        """
        prepare_folder(self.folder)
        with only_writer(self.folder / RUN, "another comparison writes into this folder"):
            self._begin()
            yield

    def load(self, number: int, prompt: str, seed: int) -> ClipRecord | None:
        """A clip that was finished before, or None.

        Raises:
            FileError: the file is damaged, or of another clip or comparison.
        """
        path = self._path(number)
        try:
            record = ClipRecord.load(path)
        except FileNotFoundError:
            return None
        numbers = record.numbers
        if numbers.comparison != self._digest:
            raise FileError(
                f"{printable(path)}: expected a clip of this comparison, found one of another; {CLIP.remedy}"
            )
        if (numbers.prompt, numbers.seed) != (prompt, seed):
            raise FileError(
                f"{printable(path)}: expected the clip of {quoted(prompt)[:100]} with seed {seed}, found that of "
                f"{quoted(numbers.prompt)[:100]} with seed {numbers.seed}; was it renamed? {CLIP.remedy.capitalize()}"
            )
        per_clip = {name for name in self.identity.metrics if METRICS[name].scores_clips}
        of_dense = {name for name in per_clip if METRICS[name].scores_dense}
        unpatched = (BASELINE, FLOOR) if self.identity.floor else (BASELINE,)
        expected = {**dict.fromkeys((*unpatched, *self.identity.subjects), per_clip), BASELINE: of_dense}
        found = {name: set(seen.scores) for name, seen in numbers.seen.items()}
        if found != expected or any(bool(seen.layers) == (name in unpatched) for name, seen in numbers.seen.items()):
            raise FileError(
                f"{printable(path)}: expected what was seen of {quoted(list(expected))} by {quoted(self.identity.metrics)}, "
                f"found other subjects or metrics; {CLIP.remedy}"
            )
        self.films.check(number, numbers.films, CLIP.remedy)
        return record

    @property
    def films(self) -> SetFilms:
        """The films for metrics of sets, whose sha256 the clips hold."""
        return SetFilms(self.folder / FILMS, self.identity.fps)

    def save(self, number: int, record: ClipRecord) -> None:
        """Writes a finished clip; raises WriteError where it cannot, and the clips before are kept."""
        numbers = msgspec.structs.replace(record.numbers, comparison=self._digest)
        dataclasses.replace(record, numbers=numbers).save(self._path(number))

    def remove(self) -> None:
        """Removes what a comparison has written, and the folder where it holds nothing else."""
        with contextlib.suppress(OSError, FileError):  # somebody has begun the same comparison again: it is theirs now
            with only_writer(self.folder / RUN, "another comparison writes into this folder"):
                for path in (*self.folder.glob(CLIPS), *self.folder.glob(".*.tmp")):
                    path.unlink(missing_ok=True)
                self.films.remove()
                (self.folder / RUN).unlink(missing_ok=True)  # last: without it what is left would be nobody's
            (self.folder / LOCK).unlink(missing_ok=True)
            self.folder.rmdir()

    @property
    def _digest(self) -> str:
        return checksum(msgspec.to_builtins(self.identity))

    def _path(self, number: int) -> Path:
        return self.folder / CLIPS.replace("*", f"{number:04}")

    def _begin(self) -> None:
        try:
            found = load_document(self.folder / RUN, KIND, Identity)
        except FileNotFoundError:
            _check_own(self.folder)
            save_document(self.folder / RUN, KIND, self.identity)
            return
        if found != self.identity and not any(
            self.folder.glob(CLIPS)
        ):  # nothing to mix: it was stopped before its first clip
            self.films.remove()
            save_document(self.folder / RUN, KIND, self.identity)
            return
        _check_same(self.folder, found, self.identity)


def check_keep(folder: Path) -> None:
    """Makes sure, before anything is loaded, that a comparison can keep its clips in a folder; it need not be there.

    Raises:
        WriteError: it cannot, or the folder holds other files.
    """
    if os.path.lexists(folder):
        prepare_folder(folder)
        if not (folder / RUN).exists():
            _check_own(folder)


def _check_own(folder: Path) -> None:
    others = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    if others:
        reason = f"it holds other files ({printable(others[0])[:60]}) and no {RUN}"
        raise WriteError(folder, reason, "name a folder of its own")


def _check_same(folder: Path, kept: Identity, asked: Identity) -> None:
    """Of msgspec's plain data, in which a list is a list however it was given."""
    theirs, mine = msgspec.to_builtins(kept), msgspec.to_builtins(asked)
    differing = [key for key in mine if mine[key] != theirs[key]]
    if differing:
        key = differing[0]
        raise FileError(
            f"{printable(folder)}: keeps clips of a comparison with {key} {quoted(theirs[key])[:120]}, this one has "
            f"{quoted(mine[key])[:120]}: their numbers cannot be mixed. Give the same {', '.join(differing)}, name another "
            "folder, or delete this one"
        )


def _digest(plan: Plan, options: Mapping[str, Any], host: HostUse) -> str:
    """Of what a plan does, and diffusers beside it; not of how it was found."""
    data = {key: value for key, value in plan_file.plain(plan).items() if key not in ("budget", "provenance")}
    tensors = {name: _bytes(each) for name, each in sorted(plan.tensors.items())}
    return checksum({"plan": data, "tensors": tensors, "host": plain(dataclasses.asdict(host)), **plain(options)})


def _bytes(tensor: Tensor) -> str:
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return f"{tensor.dtype} {list(tensor.shape)} {hashlib.sha256(data.data).hexdigest()}"
