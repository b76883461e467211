"""A folder of clips with their prompts, which metrics of sets look at."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class SetClip:
    """A clip as a file: H.264 in MP4, lossless, RGB of 8 bits."""

    path: Path
    prompt: str
    seed: int


@dataclass(frozen=True)
class ClipSet:
    """All clips of one subject, or of the dense pipeline.

    Attributes:
        folder: holds the files of `clips` and nothing else.
        clips: in the order of the comparison.
        fps: of the files.
        missing: how many clips have no file, because their frames hold NaN or infinite values.
    """

    folder: Path
    clips: tuple[SetClip, ...]
    fps: int
    missing: int
