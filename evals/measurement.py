"""A measured number together with what is needed to get it again, and the statistics of several of them."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import numpy as np

from diffusers_accel.files import FileError, Kind, Schema, load_document, printable, save_document

KIND = Kind("diffusers_accel.report", version=2, remedy="make the report again")
Better = Literal["higher", "lower", "closer", "neither"]  # closer: to the value of dense; a change to 0
Index = Annotated[int, msgspec.Meta(ge=0)]  # of a list in the same file
CONFIDENCE = 0.95
MIN_FOR_INTERVAL = 3  # a bootstrap of two values only ever draws those two


@dataclass(frozen=True)
class Spread:
    """How far the values behind one number lie apart.

    `std` is the sample standard deviation (n - 1); `low` and `high` bound the 95 % bootstrap interval of the same
    statistic (percentile method; None for fewer than three values). All in the unit of the number.
    """

    n: int
    std: float | None = None
    low: float | None = None
    high: float | None = None


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


def summarise(values: Sequence[float], statistic: Literal["mean", "median"]) -> tuple[float, Spread]:
    """The statistic of finite `values` and its spread; at least one value. The bootstrap is seeded, so repeatable."""
    data = np.asarray(values, dtype=np.float64)
    if data.size == 0 or not np.isfinite(data).all():
        raise ValueError(f"expected one or more finite values, found {list(values)}")
    function = np.mean if statistic == "mean" else np.median
    centre = float(function(data))
    if data.size == 1:
        return centre, Spread(1)
    std = float(data.std(ddof=1))
    if data.size < MIN_FOR_INTERVAL:
        return centre, Spread(data.size, std)
    if std == 0.0:
        return centre, Spread(data.size, 0.0, centre, centre)
    from scipy.stats import bootstrap

    interval = bootstrap(
        (data,), function, confidence_level=CONFIDENCE, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    return centre, Spread(data.size, std, float(interval.low), float(interval.high))


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
