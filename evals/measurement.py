"""A measured number together with what is needed to get it again, and the statistics of several of them."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np

from diffusers_accel.files import FileError, read_json, write_json

FORMAT = "diffusers_accel.report"
VERSION = 1
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
    better: Literal["higher", "lower", "neither"]
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


def write_rows(path: str | os.PathLike[str], rows: Sequence[Measurement], **extra: Any) -> None:
    """Write rows as strict JSON, each different provenance once, and `extra` beside them; whole or not at all."""
    known: list[Mapping[str, Any]] = []
    flat = []
    for row in rows:
        if row.provenance not in known:
            known.append(row.provenance)
        item = {f.name: getattr(row, f.name) for f in fields(row)} | {"provenance": known.index(row.provenance)}
        item["spread"] = asdict(row.spread) if row.spread else None
        flat.append({key: value for key, value in item.items() if value is not None or key == "value"})
    write_json(Path(path), {"format": FORMAT, "version": VERSION, **extra, "provenance": known, "measurements": flat})


def read_rows(path: str | os.PathLike[str]) -> tuple[Measurement, ...]:
    """The rows that `write_rows` wrote, each with its own provenance again.

    Raises:
        FileNotFoundError: there is nothing at `path`.
        FileError: the file does not hold rows of this version.
    """
    document = read_json(Path(path))
    found = (document.get("format"), document.get("version")) if isinstance(document, dict) else type(document).__name__
    if found != (FORMAT, VERSION):
        raise FileError(f"{path}: expected format {FORMAT!r} version {VERSION}, found {found}; make the report again")
    try:
        return tuple(_row(item, document["provenance"]) for item in document["measurements"])
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise FileError(f"{path}: expected rows of measurements, found {error!r}; make the report again") from error


def _row(item: Mapping[str, Any], provenance: Sequence[Mapping[str, Any]]) -> Measurement:
    spread = Spread(**item["spread"]) if "spread" in item else None
    return Measurement(**{"baseline": None, **item, "provenance": provenance[item["provenance"]], "spread": spread})
