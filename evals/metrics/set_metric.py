"""Metrics of a set of clips with their prompts, such as the dimensions of VBench."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from diffusers_accel.evals.metrics.clip_set import ClipSet
from diffusers_accel.evals.metrics.metric import LONGEST_REASON, Metric, MetricUnavailable, Scored, not_measured
from diffusers_accel.files import printable

# Raises MetricUnavailable with the reason, for instance what another process said before it failed.
SetScore = Callable[[ClipSet], float]


@dataclass(frozen=True, kw_only=True)
class SetMetric(Metric[SetScore]):
    """One number for all clips of a subject, once they are all there; dense is a subject here.

    The score function gets files, so that it may start a program in an environment of its own. What is not set up is said by
    `load`, before any clip is made.
    """

    kind: ClassVar[str] = "a set of clips"
    about: ClassVar[str] = (
        "These look at all clips of a subject together, and at all dense ones, as lossless films of 8 bits; a change from dense "
        "is the difference of the two numbers."
    )
    scores_clips: ClassVar[bool] = False

    def of_set(self, score: SetScore | str, clips: ClipSet) -> Scored:
        if isinstance(score, str):
            return not_measured(score)
        if clips.missing:
            total = clips.missing + len(clips.clips)
            return not_measured(f"the frames of {clips.missing} of {total} clips hold NaN or infinite values")
        try:
            value = float(score(clips))
        except MetricUnavailable as failed:
            return not_measured(printable(failed)[:LONGEST_REASON])
        return (value, None) if math.isfinite(value) else not_measured(f"{self.title} of these clips is {value}")
