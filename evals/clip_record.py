"""What was seen of one clip, in memory and as a file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np
import torch

from diffusers_accel.evals.report import Media
from diffusers_accel.evals.report.video import GAIN
from diffusers_accel.files import FileError, Kind, Schema, load_tensor_document, printable, quoted, save_tensor_document

KIND = Kind("diffusers_accel.clip", version=4, remedy="delete it, and this clip is measured again")
MOST = 1_000_000  # layers: what is above it is a mistake
FILM, DIFFERENCE = "film/", "difference/"  # before the subject's name, in the file


Some = Annotated[int, msgspec.Meta(ge=1)]
AnyNumber = Annotated[int, msgspec.Meta(ge=0)]
Share = Annotated[float, msgspec.Meta(ge=0)]  # up to 1, but for rounding
Time = Annotated[float, msgspec.Meta(gt=0)]


class LayerSeen(Schema, frozen=True):
    """A row of `Patch.report()`, where its fields are described."""

    transformer: str
    layer: Annotated[int, msgspec.Meta(ge=0, le=MOST)]
    calls: AnyNumber
    methods: dict[str, Some]
    kernels: dict[str, Some]
    density: Share | None
    reused: AnyNumber
    cache_bytes: AnyNumber
    notes: dict[str, Some]


class Seen(Schema, frozen=True):
    """Of one subject, or of the dense baseline, whose attention is timed in the first clip only.

    Times are in ms, one per run, and so are `middles`, when half of a run was over, on the clock of the process; `layers` are
    the rows of `Patch.report()` of the last run and `notes` its notes on the patch as a whole; a score is a value, or None and
    why.
    """

    times: list[Time] = []
    middles: list[float] = []
    peaks: list[AnyNumber] = []
    attention: list[Share] = []
    shares: list[Share] = []
    densities: list[Share] = []
    scores: dict[str, tuple[float | None, str | None]] = {}
    layers: list[LayerSeen] = []
    notes: list[str] = []


class ClipNumbers(Schema, frozen=True, omit_defaults=True):
    """Everything of a clip that is a number or a text.

    shape: frames, height and width in pixels. tokens: of the video per axis, and of the text. seen: by subject, "dense"
    included. repeat: largest difference of each later dense run from the first. patch_difference: the same of a dense run
    under an all-dense patch, of the first clip only. warm_up: ms by subject, of the first clip of each process. films: of the
    lossless films for metrics of sets, sha256 by subject. dense_calls: of attention under an all-dense patch, by transformer
    and layer, of the first clip only. comparison: in a file, the checksum of what it belongs to.
    """

    prompt: str
    seed: int
    shape: tuple[int, int, int]
    tokens: dict[str, int]
    seen: dict[str, Seen]
    repeat: Annotated[list[float], msgspec.Meta(min_length=1)]
    patch_difference: float | None
    fps: int
    warm_up: dict[str, Time] = {}
    films: dict[str, str] = {}
    dense_calls: dict[str, list[AnyNumber]] = {}
    comparison: str = ""


@dataclass(frozen=True)
class ClipRecord:
    """A finished clip: its numbers and, where it is shown on the page, its films (MP4) by subject."""

    numbers: ClipNumbers
    films: Mapping[str, bytes] = field(default_factory=dict, repr=False)
    differences: Mapping[str, bytes] = field(default_factory=dict, repr=False)

    @property
    def media(self) -> Media | None:
        return Media(self.films, self.differences, self.numbers.fps, GAIN) if self.films else None

    def save(self, path: Path) -> None:
        """Writes it whole or not at all."""
        films = {f"{FILM}{name}": film for name, film in self.films.items()}
        films |= {f"{DIFFERENCE}{name}": film for name, film in self.differences.items()}
        tensors = {name: torch.from_numpy(np.frombuffer(film, np.uint8).copy()) for name, film in films.items()}
        save_tensor_document(path, KIND, self.numbers, tensors)

    @staticmethod
    def load(path: Path) -> ClipRecord:
        """What `save` wrote.

        Raises:
            FileNotFoundError: there is nothing at `path`.
            FileError: it is no such file, or damaged.
        """
        numbers, tensors = load_tensor_document(path, KIND, ClipNumbers)
        for name, seen in numbers.seen.items():
            if wrong := _unequal(seen):
                raise FileError(f"{printable(path)}: seen.{printable(name)[:60]}: {wrong}; {KIND.remedy}")
        parts: dict[str, dict[str, bytes]] = {FILM: {}, DIFFERENCE: {}}
        for name, tensor in tensors.items():
            kind = next((kind for kind in parts if name.startswith(kind)), None)
            if kind is None or tensor.dtype != torch.uint8 or name.removeprefix(kind) not in numbers.seen:
                raise FileError(
                    f"{printable(path)}: expected films of its subjects, found {quoted(name)}; {KIND.remedy}"
                )
            parts[kind][name.removeprefix(kind)] = tensor.numpy().tobytes()
        in_order = [
            {name: films[name] for name in numbers.seen if name in films} for films in (parts[FILM], parts[DIFFERENCE])
        ]
        return ClipRecord(numbers, *in_order)


def _unequal(seen: Seen) -> str | None:
    """What is wrong where a subject's lists are not of the same runs, or its layers' rows not of one run."""
    runs = len(seen.times)
    if not runs or {len(seen.middles), len(seen.peaks)} != {runs}:
        return f"expected a time, its middle and a peak of each run, found {runs}, {len(seen.middles)} and {len(seen.peaks)}"
    timed = {"attention": len(seen.attention), "shares": len(seen.shares), "densities": len(seen.densities)}
    if seen.layers and set(timed.values()) != {runs}:
        return f"expected attention, shares and densities of {runs} runs, found {quoted(timed)}"
    if not seen.layers and (len(seen.densities) or timed["attention"] != timed["shares"] or timed["shares"] > 1):
        return f"expected no densities and at most one attention and share of the baseline, found {quoted(timed)}"
    for row in seen.layers:
        if row.reused > sum(row.methods.values()):
            return f"layers: expected at most {sum(row.methods.values()):,} heads x calls that reused, found {row.reused:,}"
    return None
