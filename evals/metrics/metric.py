"""What all quality metrics have in common; the kinds are in `frame_metric`, `clip_metric`, `latent_metric` and `set_metric`."""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Literal, TypeVar

import numpy as np

from diffusers_accel.evals.metrics.clip_set import ClipSet
from diffusers_accel.files import printable
from diffusers_accel.support.log import LOG

S = TypeVar("S")
Scored = tuple[float | None, str | None]  # a value and, where there is something to say of it, a note; or None and why
Latents = Sequence[
    np.ndarray
]  # that denoising ended with, a chunk each, float32 in the shape of the pipeline; none where unseen
RANGE = re.compile(r"any|up to (?P<only>[0-9.]+)|(?P<least>-?[0-9.]+) (?:to (?P<most>[0-9.]+)|upwards)")
LONGEST_REASON = 300  # characters of why a metric is missing, which each of its rows repeats


class MetricUnavailable(RuntimeError):
    """The metric cannot be computed here; the message says why and what to do."""


@dataclass(frozen=True, kw_only=True)
class Metric(ABC, Generic[S]):
    """A quality metric of any kind.

    Attributes:
        name: key in `METRICS` and in reports.
        title: as the field writes it.
        unit: "" for a plain number.
        range: the values that it can take, "0 to 1", "0 upwards", "up to 10" or "any"; `limits` reads it.
        better: the direction; "closer" where the value of the dense clip is the best there is.
        protocol: one sentence on how it is computed, its source, and which value means what.
        load: gives the score function; raises MetricUnavailable. Called once per report, before any clip is made.
        comparable: whose published numbers those of it may stand beside, as far as clips, prompts and seeds are alike too.
        needs: what it needs beside the extra `eval`; "" for nothing.
        fetch: gets and keeps its published weights, where it has some that can be had, and says what it does; raises
            MetricUnavailable. Only where the user asks: `load` never fetches.
        packages: that compute it; a report says their versions.
        digits: shown after the decimal point.
    """

    kind: ClassVar[str]  # what it looks at, in a word
    about: ClassVar[str]  # a sentence for the protocol of a report, before the sentences of the metrics of this kind
    scores_clips: ClassVar[bool] = True  # whether each clip has a value
    scores_dense: ClassVar[bool] = True  # whether dense has a value too, so that the change from it can be shown

    name: str
    title: str
    unit: str
    range: str
    better: Literal["higher", "lower", "closer"]
    protocol: str
    load: Callable[[], S]
    comparable: str = ""
    needs: str = ""
    fetch: Callable[[Callable[[str], None]], None] | None = None
    packages: tuple[str, ...] = ()
    digits: int = 4

    @property
    def limits(self) -> tuple[float, float]:
        """Least and greatest value of `range`, for axes; infinite where it names none."""
        found = RANGE.fullmatch(self.range)
        assert found is not None, f"{self.name}: {self.range}"
        return float(found["least"] or -math.inf), float(found["most"] or found["only"] or math.inf)

    @property
    def change(self) -> str:
        """The name of the rows that say how far it is from its value for dense."""
        return f"{self.name}_change"

    @property
    def from_floor(self) -> str:
        """The name of the rows that say how much worse it is than for the floor."""
        return f"{self.name}_from_floor"

    @property
    def difference(self) -> str:
        """The name of the rows that say how far it is from its value for another subject."""
        return f"{self.name}_difference"

    def loaded(self) -> S | str:
        """The score function, or why there is none, which is said at once: before anything is generated."""
        try:
            return self.load()
        except MetricUnavailable as reason:
            why = printable(reason)[:LONGEST_REASON]
            LOG.warning("%s will not be measured: %s", self.title, why)
            return why

    def of_clip(
        self,
        score: S | str,
        frames: np.ndarray,
        dense: np.ndarray | None,
        latents: tuple[Latents, Latents] = ((), ()),
    ) -> Scored | None:
        """The value of one clip; None where this kind has none.

        Args:
            score: what `loaded` gave.
            frames: [F, H, W, 3] float32 in 0..1.
            dense: the same clip of the dense pipeline; None where `frames` are that clip.
            latents: that these two were decoded from.
        """
        return None

    def of_set(self, score: S | str, clips: ClipSet) -> Scored | None:
        """The value of all clips of one subject; None where this kind has none."""
        return None


@dataclass(frozen=True, kw_only=True)
class PerClipMetric(Metric[S]):
    """A metric that has a value for each clip as soon as that is made.

    Attributes:
        smallest: least height and width in pixels.
        fewest: least number of frames.
    """

    smallest: int = 1
    fewest: int = 1

    def of_clip(
        self,
        score: S | str,
        frames: np.ndarray,
        dense: np.ndarray | None,
        latents: tuple[Latents, Latents] = ((), ()),
    ) -> Scored | None:
        if dense is None and not self.scores_dense:
            return None
        if reason := score if isinstance(score, str) else self.refuses(frames, dense):
            return not_measured(reason)
        assert not isinstance(score, str)
        try:
            return self.measured(score, frames, dense)
        except MetricUnavailable as failed:
            return not_measured(printable(failed)[:LONGEST_REASON])

    def refuses(self, frames: np.ndarray, dense: np.ndarray | None) -> str | None:
        """Why this clip cannot be scored, or None."""
        count, height, width = frames.shape[:3]
        if min(height, width) < self.smallest:
            return f"{self.title} needs frames of at least {self.smallest} x {self.smallest} pixels, found {height} x {width}"
        if count < self.fewest:
            return f"{self.title} needs at least {self.fewest} frames, found {count}"
        return None if np.isfinite(frames).all() else "the frames hold NaN or infinite values"

    @abstractmethod
    def measured(self, score: S, frames: np.ndarray, dense: np.ndarray | None) -> Scored:
        """The value of a clip that is not refused."""


def not_measured(reason: str) -> Scored:
    return None, f"not measured: {reason}"


AnyMetric = Metric[Any]
