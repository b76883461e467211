"""Tables of magnitudes, by which MagCache decides: a file for one model and one schedule."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffusers_accel.files import FileError, Kind, Schema, load_document, printable, quoted, save_document
from diffusers_accel.forwards.rules import MagCache

KIND = Kind("diffusers_accel.magnitudes", 1, "calibrate again")

Tables = dict[str, tuple[float, ...]]


class _Content(Schema, frozen=True):
    made_for: str | None
    noise: tuple[float, ...] | None
    ratios: dict[str, tuple[float, ...]]
    spread: dict[str, tuple[float, ...]]
    provenance: dict[str, Any]


@dataclass(frozen=True)
class Magnitudes:
    """By how much the residual, what a model adds to its input, grows or shrinks from step to step.

    Args:
        ratios: of each step of a schedule to the one before, for each branch of guidance by the pipeline's name for it; "" where
            it has none. That of step 0, and of a step before which nothing ran, is 1.
        spread: the standard deviation of these over prompts; 0 for a single one.
        made_for: the model, as the rule's; None where a pipeline has several that differ.
        noise: the share of noise at each step, in [0, 1]; None where nobody knows it.
        provenance: what it was made with, as JSON data.

    Raises:
        ValueError: the tables are not of equal length, or hold what is no ratio.
    """

    ratios: Tables
    spread: Tables
    made_for: str | None = None
    noise: tuple[float, ...] | None = None
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        tables = [*self.ratios.values(), *self.spread.values(), *([] if self.noise is None else [self.noise])]
        if not self.ratios or set(self.ratios) != set(self.spread) or len({len(table) for table in tables}) != 1:
            raise ValueError(
                "expected ratios and spread of the same branches, each and noise with a number for each step, found "
                f"{quoted({name: len(table) for name, table in self.ratios.items()})}"
            )
        if not all(value >= 0 for table in self.spread.values() for value in table):
            raise ValueError("spread: expected numbers of 0 or more")
        self.rule()

    @property
    def steps(self) -> int:
        return len(next(iter(self.ratios.values())))

    def rule(self, threshold: float = 0.12, max_skips: int = 2, retention: float = 0.2) -> MagCache:
        """The rule that decides by it, with parameters as of `MagCache`."""
        ratios: Any = next(iter(self.ratios.values())) if set(self.ratios) == {""} else dict(self.ratios)
        return MagCache(ratios, threshold, max_skips, retention, self.made_for, self.noise)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes it as JSON, whole or not at all."""
        save_document(
            Path(path),
            KIND,
            _Content(
                made_for=self.made_for,
                noise=self.noise,
                ratios=self.ratios,
                spread=self.spread,
                provenance=self.provenance,
            ),
        )

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Magnitudes:
        """What `save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            FileError: it is something else, or damaged.
        """
        content = load_document(Path(path), KIND, _Content)
        try:
            return Magnitudes(content.ratios, content.spread, content.made_for, content.noise, content.provenance)
        except ValueError as error:
            raise FileError(f"{printable(path)}: {error}; {KIND.remedy}") from error
