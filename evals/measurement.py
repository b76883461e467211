"""A measured number together with what is needed to get it again; `intervals` has the statistics of several."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from diffusers_accel.files import FileError, Kind, Schema, load_document, printable, save_document

KIND = Kind("diffusers_accel.report", version=3, remedy="make the report again")
Better = Literal["higher", "lower", "closer", "neither"]  # closer: to the value of dense; a change to 0
Index = Annotated[int, msgspec.Meta(ge=0)]  # of a list in the same file


@dataclass(frozen=True)
class Spread:
    """How far the values behind one number lie apart, and how sure the number is.

    `std` is the sample standard deviation (n - 1). `low` and `high` bound the 95 % interval, where the number has one (see
    `intervals.estimate`): it rests on `prompts`, as seeds of one prompt count once, and was widened for `comparisons` intervals
    side by side. All in the unit of the number.
    """

    n: int
    std: float | None = None
    low: float | None = None
    high: float | None = None
    median: float | None = None
    prompts: int = 0
    comparisons: int = 1


@dataclass(frozen=True)
class Measurement:
    """One number.

    `value` is None where nothing could be measured or the number has no finite value; `note` then says why.
    `clip` is None for a number over all clips, else what identifies the clip (prompt and seed).
    `provenance` holds machine, versions, shapes, counts and the protocol.
    """

    metric: str
    value: float | None
    unit: str
    better: Better
    subject: str
    baseline: str | None
    provenance: Mapping[str, Any] = field(repr=False)
    spread: Spread | None = None
    clip: Mapping[str, Any] | None = None
    note: str | None = None

    def __post_init__(self) -> None:
        if self.value is None and not self.note:
            raise ValueError(f"{self.metric} of {self.subject!r}: a missing value needs a note that says why")
        if self.value is not None and not math.isfinite(self.value):
            raise ValueError(
                f"{self.metric} of {self.subject!r}: expected a finite value, found {self.value}; "
                "give None and a note (JSON has neither infinity nor NaN)"
            )


def write_rows(path: str | os.PathLike[str], rows: Sequence[Measurement], headline: str = "") -> None:
    """Write rows as a document (`files.documents`), each different provenance and clip once; whole or not at all.

    Raises:
        FileError: there is more than `read_rows` would read again.
        WriteError: `path` cannot be written.
    """
    known: list[Mapping[str, Any]] = []
    clips: list[Mapping[str, Any]] = []
    flat = [_flat(row, _index(row.provenance, known), clips) for row in rows]
    provenance = [dict(each) for each in known]
    named = [_Clip(prompt=clip["prompt"], seed=clip["seed"]) for clip in clips]
    save_document(Path(path), KIND, _Rows(headline=headline, provenance=provenance, clips=named, measurements=flat))


def read_rows(path: str | os.PathLike[str]) -> tuple[Measurement, ...]:
    """The rows that `write_rows` wrote, each with its own provenance and clip again.

    Raises:
        FileNotFoundError: there is nothing at `path`.
        FileError: the file does not hold rows of this version, or is damaged.
    """
    document = load_document(Path(path), KIND, _Rows)
    try:
        return tuple(_row(item, document) for item in document.measurements)
    except (IndexError, ValueError) as error:
        raise FileError(f"{printable(path)}: {printable(error)[:300]}; {KIND.remedy}") from error


class _Clip(Schema, frozen=True):
    prompt: str
    seed: int


class _Spread(Schema, frozen=True):
    n: Annotated[int, msgspec.Meta(ge=1)]
    std: float | None
    low: float | None
    high: float | None
    median: float | None
    prompts: Annotated[int, msgspec.Meta(ge=0)]
    comparisons: Annotated[int, msgspec.Meta(ge=1)]


class _Row(Schema, frozen=True, omit_defaults=True):
    metric: str
    value: float | None
    unit: str
    better: Better
    subject: str
    provenance: Index
    baseline: str | None = None
    spread: _Spread | None = None
    clip: Index | None = None
    note: str | None = None


class _Rows(Schema, frozen=True):
    headline: str
    provenance: list[dict[str, Any]]
    clips: list[_Clip]
    measurements: list[_Row]


def _index(value: Mapping[str, Any], known: list[Mapping[str, Any]]) -> int:
    """Its place in the list, at whose end it is put where it is new."""
    for index, each in enumerate(known):
        if each is value or each == value:
            return index
    known.append(value)
    return len(known) - 1


def _flat(row: Measurement, provenance: int, clips: list[Mapping[str, Any]]) -> _Row:
    return _Row(
        metric=row.metric,
        value=row.value,
        unit=row.unit,
        better=row.better,
        subject=row.subject,
        provenance=provenance,
        baseline=row.baseline,
        spread=_Spread(**asdict(row.spread)) if row.spread else None,
        clip=None if row.clip is None else _index(row.clip, clips),
        note=row.note,
    )


def _row(item: _Row, document: _Rows) -> Measurement:
    fields = msgspec.structs.asdict(item)
    spread = Spread(**msgspec.structs.asdict(item.spread)) if item.spread else None
    clip = None if item.clip is None else msgspec.structs.asdict(document.clips[item.clip])
    return Measurement(**{**fields, "provenance": document.provenance[item.provenance], "spread": spread, "clip": clip})
