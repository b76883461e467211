"""The lossless films that metrics of sets look at: a folder for each subject, a file for each clip."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from diffusers_accel.evals.clip_record import ClipNumbers
from diffusers_accel.evals.metrics import ClipSet, SetClip
from diffusers_accel.evals.report.video import encode_lossless
from diffusers_accel.files import FileError, prepare_folder, printable, write_whole

FILM = "{:04}.mp4"


@dataclass(frozen=True)
class SetFilms:
    """The films of one comparison below a folder, which is made with the first of them."""

    folder: Path
    fps: int

    def save(self, subject: str, number: int, frames: np.ndarray) -> str | None:
        """Writes the film of a clip, whole or not at all, before what refers to it.

        Args:
            frames: [F, H, W, 3] float32 in 0..1.

        Returns:
            Its sha256; None, and no film, where frames are not finite.
        """
        if not np.isfinite(frames).all():
            return None
        film, path = encode_lossless(frames, self.fps), self._path(subject, number)
        prepare_folder(path.parent)
        write_whole(path, film)
        return hashlib.sha256(film).hexdigest()

    def check(self, number: int, films: Mapping[str, str], remedy: str) -> None:
        """Raises FileError where a film of a clip, by subject, is not there or is not what was written."""
        for subject, sha256 in films.items():
            path = self._path(subject, number)
            found = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
            if found != sha256:
                raise FileError(
                    f"{printable(path)}: expected the film of clip {number}, found {'another' if found else 'no'} file; "
                    f"{remedy}"
                )

    def of(self, subject: str, clips: Sequence[ClipNumbers]) -> ClipSet:
        """The set of a subject."""
        there = [(number, clip) for number, clip in enumerate(clips) if subject in clip.films]
        found = tuple(SetClip(self._path(subject, number), clip.prompt, clip.seed) for number, clip in there)
        return ClipSet(self._folder(subject), found, self.fps, len(clips) - len(found))

    def remove(self) -> None:
        """Removes the films, and folders that hold nothing else."""
        for path in (*self.folder.glob("*/*.mp4"), *self.folder.glob("*/.*.tmp")):
            path.unlink(missing_ok=True)
        for folder in (*self.folder.glob("*"), self.folder):
            with contextlib.suppress(OSError):  # not there, or not empty: then it holds what is not ours
                folder.rmdir()

    def _path(self, subject: str, number: int) -> Path:
        return self._folder(subject) / FILM.format(number)

    def _folder(self, subject: str) -> Path:
        """By a hash: a subject's name may hold anything, and its place in the order may change between two starts."""
        return self.folder / hashlib.sha256(subject.encode()).hexdigest()[:16]
