"""What a comparison found, for what writes, draws and words it; `Report` makes it whole."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from diffusers_accel.evals.measurement import Measurement
from diffusers_accel.plan import Plan

FLOOR = "floor"  # the name of the runs with dense attention in another exact kernel


@dataclass(frozen=True)
class Media:
    """MP4 films of one clip: by subject ("dense" included), and of |subject - dense| x gain by subject."""

    videos: Mapping[str, bytes]
    differences: Mapping[str, bytes]
    fps: int
    gain: int


@dataclass(frozen=True)
class Clip:
    """One prompt with one seed; `media` only for those that the page shows."""

    prompt: str
    seed: int
    media: Media | None = field(default=None, repr=False)

    @property
    def key(self) -> dict[str, Any]:
        """How rows refer to it."""
        return {"prompt": self.prompt, "seed": self.seed}


@dataclass(frozen=True)
class Subject:
    """What was compared with the dense baseline: its plan, what ran per layer (rows of `Patch.report()`), and what of diffusers
    itself was on, in words."""

    name: str
    plan: Plan
    layers: list[dict[str, Any]]
    host: str = ""


@dataclass(frozen=True)
class Findings:
    """See `Report`."""

    rows: tuple[Measurement, ...]
    clips: tuple[Clip, ...]
    subjects: tuple[Subject, ...]
    provenance: Mapping[str, Any] = field(repr=False)

    @property
    def names(self) -> list[str]:
        """What stands beside dense: the floor, where there is one, and the subjects."""
        floor = [FLOOR] if any(row.subject == FLOOR for row in self.rows) else []
        return [*floor, *(subject.name for subject in self.subjects)]

    def row(self, metric: str, subject: str, clip: Clip | None = None) -> Measurement | None:
        """The row of a metric of a subject, over all clips or of one; None where there is none."""
        return self._by_clip.get((metric, subject, (clip.prompt, clip.seed) if clip else None))

    @cached_property
    def _by_clip(self) -> dict[tuple[str, str, Any], Measurement]:
        """The rows, but for those of pairs; a large report is asked for each of them."""
        found: dict[tuple[str, str, Any], Measurement] = {}
        for row in self.rows:
            found.setdefault(
                (row.metric, row.subject, (row.clip["prompt"], row.clip["seed"]) if row.clip else None), row
            )
        return found

    def pair(self, metric: str, one: str, other: str) -> Measurement | None:
        """The row of what the first of two subjects has more than the other, over all clips."""
        return next((r for r in self.rows if (r.metric, r.subject, r.baseline) == (metric, one, other)), None)
