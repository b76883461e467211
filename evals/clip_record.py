"""What was seen of one clip, in memory and as a file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
import torch

from diffusers_accel.evals.report import Media
from diffusers_accel.evals.report.video import GAIN
from diffusers_accel.files import FileError, Kind, Schema, load_tensor_document, printable, quoted, save_tensor_document

KIND = Kind("diffusers_accel.clip", version=2, remedy="delete it, and this clip is measured again")
FILM, DIFFERENCE = "film/", "difference/"  # before the subject's name, in the file


class Seen(Schema, frozen=True):
    """Of one subject, or of the dense baseline, whose attention is timed in the first clip only.

    Times are in ms, one per run; `layers` are the rows of `Patch.report()` of the last run and `notes` its notes on the patch as
    a whole; a score is a value, or None and why.
    """

    times: list[float] = []
    peaks: list[int] = []
    attention: list[float] = []
    shares: list[float] = []
    densities: list[float] = []
    scores: dict[str, tuple[float | None, str | None]] = {}
    layers: list[dict[str, Any]] = []
    notes: list[str] = []


class ClipNumbers(Schema, frozen=True):
    """Everything of a clip that is a number or a text.

    shape: frames, height and width in pixels. tokens: of the video per axis, and of the text. seen: by subject, "dense"
    included. repeat: largest difference of each later dense run from the first. patch_difference: the same of a dense run
    under an all-dense patch, of the first clip only. comparison: in a file, the checksum of what it belongs to.
    """

    prompt: str
    seed: int
    shape: tuple[int, int, int]
    tokens: dict[str, int]
    seen: dict[str, Seen]
    repeat: Annotated[list[float], msgspec.Meta(min_length=1)]
    patch_difference: float | None
    fps: int
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
