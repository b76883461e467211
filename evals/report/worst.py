"""Which clip came out worst: a mean hides it, and it is the first to look at."""

from __future__ import annotations

import math

from diffusers_accel.evals.metrics import METRICS, AnyMetric
from diffusers_accel.evals.report.findings import Clip, Findings

LONGEST_PROMPT = 60  # characters, where one is named in a sentence


def clip_name(clip: Clip) -> str:
    prompt = clip.prompt if len(clip.prompt) <= LONGEST_PROMPT else f"{clip.prompt[: LONGEST_PROMPT - 1]}…"
    return f"“{prompt}” seed {clip.seed}"


def worst_of(report: Findings, metric: AnyMetric, subject: str) -> tuple[float, Clip] | None:
    """The worst value of a subject and its clip; None where the metric has no direction or the clips have no values."""
    sign = {"higher": 1, "lower": -1}.get(metric.better)
    rows = [(report.row(metric.name, subject, clip), clip) for clip in report.clips]
    values = [(row.value, clip) for row, clip in rows if row and row.value is not None]
    return min(values, key=lambda each: sign * each[0]) if values and sign else None


def worst_of_pair(report: Findings, metric: AnyMetric | None, one: str, other: str) -> tuple[float, Clip] | None:
    """What the first has more than the other where it stands worst beside it; as a ratio of speeds where `metric` is None."""
    name, sign = (metric.name, {"higher": 1, "lower": -1}.get(metric.better)) if metric else ("speedup", 1)
    found = []
    for clip in report.clips:
        mine, theirs = report.row(name, one, clip), report.row(name, other, clip)
        if mine and theirs and mine.value is not None and theirs.value is not None:
            found.append((mine.value - theirs.value if metric else mine.value / theirs.value, clip))
    return min(found, key=lambda each: sign * each[0]) if found and sign else None


def worst_first(report: Findings) -> list[Clip]:
    """The clips, that with the worst value of any subject first, by the first metric that has a direction."""
    names = {row.metric for row in report.rows if row.clip}
    metric = next(
        (each for each in METRICS.values() if each.name in names and each.better in ("higher", "lower")), None
    )
    if metric is None:
        return list(report.clips)
    sign = 1 if metric.better == "higher" else -1

    def worst(clip: Clip) -> float:
        rows = [report.row(metric.name, subject.name, clip) for subject in report.subjects]
        return min((sign * row.value for row in rows if row and row.value is not None), default=math.inf)

    return sorted(report.clips, key=worst)
