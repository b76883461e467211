"""A span of a plan: the method of each head, by its symbol, in one stretch of the schedule."""

from __future__ import annotations

import itertools
import re
import string
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any, Literal

Row = tuple[str, ...]  # the symbols of a layer, one per head

LONGEST_SYMBOL = 16
SYMBOL = re.compile(rf"[A-Za-z0-9.][A-Za-z0-9._-]{{0,{LONGEST_SYMBOL - 1}}}")
LETTERS = string.ascii_letters + string.digits[1:]  # beside "." for dense heads and "0" for skipped ones


By = Literal["share", "sigma"]
EDGES: dict[str, tuple[str, str]] = {"share": ("start", "stop"), "sigma": ("from_sigma", "to_sigma")}  # in a file


@dataclass(frozen=True)
class Span:
    """One stretch of the schedule.

    Args:
        start: where it begins: a share of the schedule's steps, in [0, 1), or its largest noise level, in (0, 1].
        stop: where it ends: a share in (0, 1], or the noise level in [0, 1) with which the next one begins.
        heads: transformer name -> a row per layer, which holds a method's symbol per head. A row that is given as one text is
            taken as symbols of one character.
        by: "share" of the steps, which grows from 0 to 1, or "sigma", the noise level of flow matching, which falls from 1 to 0.
    """

    start: float
    stop: float
    heads: dict[str, tuple[Row, ...]]
    by: By = "share"

    def __post_init__(self) -> None:
        object.__setattr__(self, "heads", {name: _rows(rows) for name, rows in self.heads.items()})

    @property
    def label(self) -> str:
        """For tables, such as "0% to 25% of the steps" or "sigma 1 to 0.6"."""
        if self.by == "sigma":
            return f"sigma {self.start:g} to {self.stop:g}"
        return f"{self.start:.0%} to {self.stop:.0%} of the steps"

    @property
    def length(self) -> float:
        """Of the schedule, in (0, 1]."""
        return abs(self.stop - self.start)


def compact(symbols: Collection[str]) -> bool:
    """Whether rows of these symbols are written without spaces: all have one character."""
    return all(len(symbol) == 1 for symbol in symbols)


def row_text(row: Row, symbols: Collection[str]) -> str:
    """A row of a plan with these symbols, as files and messages show it."""
    return ("" if compact(symbols) else " ").join(row)


def row_of(text: str, symbols: Collection[str]) -> Row:
    """The inverse of `row_text`."""
    return tuple(text if compact(symbols) else text.split(" "))


def new_symbols() -> Iterator[str]:
    """Symbols without end, neither "." nor "0": a to 9, then of two characters, and so on."""
    for length in itertools.count(1):
        yield from map("".join, itertools.product(LETTERS, repeat=length))


def _rows(given: Any) -> Any:
    """Rows as tuples; what is no row stays as it is, for the check of the plan to refuse."""
    if not isinstance(given, (str, list, tuple)):
        return given
    return tuple(tuple(row) if isinstance(row, (str, list)) else row for row in given)
