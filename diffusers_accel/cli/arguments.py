"""What the command line is given, checked before a model is loaded: texts, numbers, plans, and places to write."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path

from diffusers_accel.arguments import NAMES
from diffusers_accel.files import FileError, printable, quoted, read_bytes
from diffusers_accel.part_names import part_named, part_names
from diffusers_accel.plan import Plan
from diffusers_accel.search.keeping import check_places
from diffusers_accel.search.scores import Scores
from diffusers_accel.subject import split
from diffusers_accel.support.prompts import REPORT, SEARCH
from diffusers_accel.support.suggest import did_you_mean, did_you_mean_file

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
    if pipe == "shapes":
        from diffusers_accel.evals.shapes import held_out_prompts

        return held_out_prompts(8, seed=0)[:4] if for_search else held_out_prompts(8, seed=0)[4:]
    return list(SEARCH if for_search else REPORT)


def read_plan(path: Path) -> Plan:
    try:
        return Plan.load(path)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}{did_you_mean_file(path)}") from error


def read_subjects(plans: Sequence[str]) -> dict[str, Plan | str | list[Plan | str]]:
    """Name -> plan, name of a method, or list of a step cache and what goes with it, which is written with "+" between them. The
    name is what stands before "=", else those of the methods and the files' stems."""
    given: dict[str, str] = {}
    for item in plans:
        name, separator, value = item.partition("=")
        if not separator or os.path.isfile(item):
            name, value = "+".join(part if part in NAMES else Path(part).stem for part in _composed(item)), item
        if name in given:
            first, second = printable(given[name]), printable(value)
            raise ValueError(
                f"--plan: two plans are called {quoted(name)}; give them names: --plan first={first} --plan second={second}"
            )
        given[name] = value
    return {name: _subject(value) for name, value in given.items()}


def _composed(value: str) -> list[str]:
    """What stands between the "+" of a composition; all of it where that is a file."""
    return [value] if os.path.exists(value) else value.split("+")


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


def _subject(value: str) -> Plan | str | list[Plan | str]:
    parts = [_part(part) for part in _composed(value)]
    subject = parts if len(parts) > 1 else parts[0]
    try:
        split(subject, {})
    except ValueError as error:
        raise ValueError(f"--plan {printable(value)}: {error}") from error
    return subject


def _part(value: str) -> Plan | str:
    if value in NAMES:
        return value
    path = Path(value)
    if path.suffix == ".json" or (value and os.path.exists(path)):
        return read_plan(path)
    if part := part_named(value):
        raise ValueError(
            f"--plan: {quoted(value)} is {part.what}, and no method by itself. In Python, this writes a plan file of it: "
            f'{part.line}.plan.save("{value.casefold()}.json")'
        )
    meant = did_you_mean(value, [*NAMES, *part_names()]) or did_you_mean_file(path)
    raise ValueError(
        f"--plan: expected a method ({', '.join(NAMES)}), a plan file, or a step cache and one of these with + between them, "
        f"found {quoted(value)}{meant}"
    )
