"""The clips that VBench looks at: films of a folder, with their prompts."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from diffusers_accel.files import FileError, checksum, printable, quoted, read_json, shaped

FILM = ".mp4"
REPORT = "report.json"
LONGEST_PROMPT = 10_000  # characters
OTHERS = (".gif", ".jpg", ".png", ".avi", ".mkv", ".mov", ".webm")
NUMBERED = re.compile(r"-\d+$")


@dataclass(frozen=True)
class Film:
    """A film and what it was to show; of VBench's own ones also the dimensions that are measured on it."""

    path: Path
    prompt: str
    dimensions: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Clips:
    """A set of clips by their names.

    Attributes:
        standard: whether they are VBench's own, named as it asks for.
        samples: of each prompt, of a standard set.
    """

    clips: Mapping[str, Film]
    standard: bool = False
    samples: int = 0

    def digest(self) -> str:
        """What tells this set from another: names, prompts, and what is in the files."""
        files = {name: [clip.prompt, _sha256(clip.path)] for name, clip in self.clips.items()}
        return checksum({"standard": self.standard, "samples": self.samples, "clips": files})


def clips_of(dimension: str, clips: Clips) -> Clips:
    """The part of a set that a dimension looks at: of VBench's own set the clips of its prompts."""
    if not clips.standard:
        return clips
    found = {name: clip for name, clip in clips.clips.items() if dimension in clip.dimensions}
    return Clips(found, True, clips.samples)


def read_folder(folder: Path, prompts: Path | None = None) -> Clips:
    """The films of a folder, which may be anybody's.

    Args:
        prompts: a JSON file, name of a film -> its prompt. Without it a prompt is the film's name, less ".mp4" and less a number
            behind "-" at its end, as VBench reads it.

    Raises:
        FileNotFoundError: there is no such folder or file.
        FileError: it holds no films, or the prompts are not of these films.
    """
    if not folder.is_dir():
        found = "a file" if folder.exists() else "nothing there"
        raise FileNotFoundError(f"{printable(folder)}: expected a folder of films, found {found}")
    names = sorted(path.name for path in folder.iterdir() if path.suffix.lower() == FILM and path.is_file())
    if not names and (folder / REPORT).is_file():
        raise FileError(
            f"{printable(folder)}: expected films ({FILM}), found a report, whose page has small compressed ones only: "
            "measure VBench when the report is made, with --metric vbench_..."
        )
    if not names:
        others = sorted(path.name for path in folder.iterdir() if path.suffix.lower() in OTHERS)
        found = f"{printable(others[0])[:60]}; convert it" if others else "none"
        raise FileError(f"{printable(folder)}: expected films that end in {FILM}, found {found}")
    told = _read_prompts(prompts, names) if prompts else {name: prompt_of(name) for name in names}
    return Clips({name: Film(folder / name, told[name]) for name in names})


def prompt_of(name: str) -> str:
    """ "a cat-3.mp4" -> "a cat"."""
    return NUMBERED.sub("", name[: -len(FILM)])


def _read_prompts(path: Path, names: list[str]) -> dict[str, str]:
    try:
        found = shaped(read_json(path), dict[str, str], "the file")
    except FileError as error:
        message = str(error).removeprefix(f"{printable(path)}: ")
        raise FileError(f'{printable(path)}: {message}; expected JSON such as {{"clip.mp4": "a cat"}}') from error
    if lost := sorted(set(names) - set(found)):
        raise FileError(f"{printable(path)}: expected a prompt of each film, found none of {quoted(lost[0])}")
    long = [name for name in names if not found[name].strip() or len(found[name]) > LONGEST_PROMPT]
    if long:
        raise FileError(
            f"{printable(path)}: expected prompts of 1 to {LONGEST_PROMPT:,} characters, found {quoted(found[long[0]])}"
        )
    return found


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
