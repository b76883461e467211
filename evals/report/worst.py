"""Which clip came out worst: a mean hides it, and it is the first to look at."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from diffusers_accel.evals.metrics import METRICS, AnyMetric, Scored
from diffusers_accel.evals.report.findings import Clip, Findings

LONGEST_PROMPT = 60  # characters, where one is named in a sentence
SIGNS = {"higher": 1, "lower": -1}  # by the direction of a metric; others say nothing of what is worse


def clip_name(clip: Clip) -> str:
    prompt = clip.prompt if len(clip.prompt) <= LONGEST_PROMPT else f"{clip.prompt[: LONGEST_PROMPT - 1]}…"
    return f"“{prompt}” seed {clip.seed}"


def worst_of(report: Findings, metric: AnyMetric, subject: str) -> tuple[float, Clip] | None:
    """The worst value of a subject and its clip; None where the metric has no direction or the clips have no values."""
    sign = SIGNS.get(metric.better)
    rows = [(report.row(metric.name, subject, clip), clip) for clip in report.clips]
    values = [(row.value, clip) for row, clip in rows if row and row.value is not None]
    return min(values, key=lambda each: sign * each[0]) if values and sign else None


def worst_of_pair(report: Findings, metric: AnyMetric | None, one: str, other: str) -> tuple[float, Clip] | None:
    """What the first has more than the other where it stands worst beside it; as a ratio of speeds where `metric` is None."""
    name, sign = (metric.name, SIGNS.get(metric.better)) if metric else ("speedup", 1)
    found = []
    for clip in report.clips:
        mine, theirs = report.row(name, one, clip), report.row(name, other, clip)
        if mine and theirs and mine.value is not None and theirs.value is not None:
            found.append((mine.value - theirs.value if metric else mine.value / theirs.value, clip))
    return min(found, key=lambda each: sign * each[0]) if found and sign else None


def rank(scores: Mapping[str, Sequence[Scored]]) -> tuple[float, ...]:
    """How good a clip is, to sort clips by: the worst of what its subjects have by the first metric that has a direction, then
    by the next one. A clip that could not be scored, as where frames are NaN, comes before all others; one that is identical
    to dense after them.

    Args:
        scores: by metric, those of all subjects in this clip; of the same metrics for all clips that are compared.
    """
    directed = [metric for metric in METRICS.values() if metric.name in scores and metric.better in SIGNS]
    return tuple(min(_goodness(metric, each) for each in scores[metric.name]) for metric in directed)


def _goodness(metric: AnyMetric, scored: Scored) -> float:
    value, note = scored
    if value is None:
        return math.inf if note == "identical" else -math.inf
    return SIGNS[metric.better] * value


def worst_first(report: Findings) -> list[Clip]:
    """The clips, the worst by `rank` first."""
    names = {row.metric for row in report.rows if row.clip} & METRICS.keys()

    def scores(clip: Clip) -> dict[str, list[Scored]]:
        rows = {name: [report.row(name, subject.name, clip) for subject in report.subjects] for name in names}
        return {name: [(row.value, row.note) for row in found if row] for name, found in rows.items() if all(found)}

    return sorted(report.clips, key=lambda clip: rank(scores(clip)))


def ranked_by(report: Findings) -> AnyMetric | None:
    """The metric that decides first which clip is worst; None where there is none with a direction."""
    names = {row.metric for row in report.rows if row.clip}
    return next((each for each in METRICS.values() if each.name in names and each.better in SIGNS), None)
