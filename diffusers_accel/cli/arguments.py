"""What the command line is given, checked before a model is loaded: texts, numbers, and places to write."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path

from diffusers_accel.cli.toy import TOY
from diffusers_accel.files import FileError, printable, quoted, read_bytes
from diffusers_accel.search.keeping import check_places
from diffusers_accel.search.scores import Scores
from diffusers_accel.support.prompts import REPORT, SEARCH, VALIDATION
from diffusers_accel.support.suggest import did_you_mean_file

MAX_PROMPT_BYTES = 2**20


def check_finite(flag: str, number: float | None) -> None:
    if number is not None and not math.isfinite(number):
        raise ValueError(f"{flag}: expected a number, found {number}")


def check_whole(flag: str, number: int | None, least: int = 1, most: int = 2**16) -> None:
    if number is not None and not least <= number <= most:
        raise ValueError(f"{flag}: expected a whole number from {least} to {most:,}, found {quoted(number)}")


def check_seed(seed: int) -> None:
    check_whole("--seed", seed, 0, 2**63 - 1)


def check_share(flag: str, number: float) -> None:
    if not 0 <= number <= 1:
        raise ValueError(f"{flag}: expected a share in 0..1, found {number}")


def check_prompts(prompts: Sequence[str]) -> None:
    """Refuses texts that no text encoder takes."""
    for prompt in prompts:
        if not prompt.strip():
            raise ValueError(f"prompts: expected texts, found the empty one {quoted(prompt)}; leave it out")
        if "\0" in prompt or any("\ud800" <= letter <= "\udfff" for letter in prompt):
            raise ValueError(f"prompts: expected texts in UTF-8, found {quoted(prompt)}")


def read_prompts(path: Path) -> list[str]:
    """The lines of a text file in UTF-8 that are not blank."""
    try:
        data = read_bytes(path, MAX_PROMPT_BYTES, "a text file with a prompt on each line")
        text = data.decode("utf-8-sig")
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}{did_you_mean_file(path)}") from error
    except UnicodeDecodeError as error:
        raise FileError(
            f"{printable(path)}: expected text in UTF-8, found the byte 0x{data[error.start]:02x} at {error.start:,}; "
            "is it another kind of file? A text is saved anew as UTF-8"
        ) from None
    if "\0" in text:
        raise FileError(f"{printable(path)}: expected text in UTF-8, found a zero byte; is it another kind of file?")
    if prompts := [line.strip() for line in text.splitlines() if line.strip()]:
        return prompts
    raise FileError(f"{printable(path)}: expected a prompt on each line, found none")


def find_prompts(pipe: str, prompt: list[str] | None, file: Path | None, *, for_search: bool) -> list[str]:
    """The prompts that were given, else four that no other command takes."""
    if prompt and file:
        raise ValueError("prompts: expected --prompt or --prompts, found both")
    if given := read_prompts(file) if file else prompt:
        check_prompts(given)
        return given
    if pipe == TOY:
        from diffusers_accel.evals.toy import held_out_prompts

        return held_out_prompts(8, seed=0)[:4] if for_search else held_out_prompts(8, seed=0)[4:]
    return list(SEARCH if for_search else REPORT)


def find_validation(pipe: str, file: Path | None) -> list[str]:
    """The prompts that decide whether a plan is taken: those of a file, else eight that no other command takes."""
    if file:
        given = read_prompts(file)
        check_prompts(given)
        return given
    if pipe == TOY:
        from diffusers_accel.evals.toy import held_out_prompts

        return held_out_prompts(16, seed=0)[8:]
    return list(VALIDATION)


def check_out(out: Path) -> None:
    if out.suffix != ".json":
        raise ValueError(f'--out: expected a file name that ends in ".json", found {quoted(str(out))}')


def search_places(out: Path, scores: Path | None) -> Path:
    """Where a search keeps its scores; all its files can be written, and scores that are there are scores."""
    _, kept = check_places(out, scores, ("--out", "--scores"))
    assert kept is not None  # beside the plan, at least
    if os.path.exists(kept):
        Scores.load(kept)
    return kept
