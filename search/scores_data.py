"""The fields of scores, for what checks them; `Scores` makes them whole."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from diffusers_accel.layout import TokenLayout
from diffusers_accel.methods import Method
from diffusers_accel.search.scores_file import Array, CalibrationRun
from diffusers_accel.shape import ModelShape


@dataclass(frozen=True)
class ScoresData:
    """See `Scores`."""

    family: str
    models: dict[str, ModelShape]
    layout: TokenLayout
    candidates: tuple[Method, ...]
    spans: tuple[tuple[float, float], ...]
    segments: int
    config: dict[str, Any]
    provenance: dict[str, Any]
    runs: tuple[CalibrationRun, ...]
    sums: dict[str, Array]
    impacts: tuple[dict[str, tuple[float, ...]], ...] = ()
