"""Subjects beside each other, clip by clip: the same prompt, seed and noise."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

from diffusers_accel.evals.intervals import estimate
from diffusers_accel.evals.measurement import Measurement
from diffusers_accel.evals.metrics import METRICS
from diffusers_accel.evals.report import Clip
from diffusers_accel.evals.report.pair_table import SPEED
from diffusers_accel.evals.tally import SubjectTally, changes, over_clips


def pair_rows(
    tallies: Mapping[str, SubjectTally], dense: SubjectTally, clips: Sequence[Clip], provenance: dict[str, Any]
) -> Iterator[Measurement]:
    """Of each two subjects, by name: how much faster the first is, and what it has more of each metric; over all clips."""
    prompts = [clip.prompt for clip in clips]
    pairs = list(combinations(tallies, 2))
    for one, other in pairs:
        mine, theirs = tallies[one], tallies[other]
        ratios = [a / b for a, b in zip(mine.speedups(dense), theirs.speedups(dense), strict=True)]
        mean, spread = estimate(ratios, prompts, comparisons=len(pairs), ratio=True)
        yield Measurement(SPEED, mean, "x", "higher", one, other, provenance, spread)
        for name, found in mine.scores.items():
            metric = METRICS[name]
            value, spread_, note = over_clips(changes(found, theirs.scores[name]), prompts, len(pairs))
            yield Measurement(
                metric.difference, value, metric.unit, metric.better, one, other, provenance, spread_, note=note
            )
