"""What somebody may have meant by a name or a path that does not exist."""

from __future__ import annotations

import os
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path

from diffusers_accel.files import printable

LONGEST = 200  # characters of a word that is worth a comparison, whose time grows with their square


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """'; did you mean "draft"?' for a word that resembles one of the `known` ones, whatever its case; else an empty text."""
    close = closest(word, known)
    return "" if close is None else f'; did you mean "{printable(close)}"?'


def did_you_mean_file(path: Path) -> str:
    """The same for a path at which there is nothing: a file or folder beside it whose name resembles its own."""
    try:
        names = os.listdir(path.parent)
    except (OSError, ValueError):
        return ""
    close = closest(path.name, (name for name in names if not name.startswith(".")))
    return "" if close is None else f'; did you mean "{printable(path.with_name(close))}"?'


def closest(word: str, known: Iterable[str]) -> str | None:
    """The known name that a word resembles most, whatever its case; None where none is near."""
    names = {name.casefold(): name for name in known}
    close = get_close_matches(word.casefold(), names, n=1) if len(word) <= LONGEST else []
    return names[close[0]] if close else None
