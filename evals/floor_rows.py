"""How far each subject is from the floor, clip by clip."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from diffusers_accel.evals.measurement import Measurement, Spread
from diffusers_accel.evals.metrics import METRICS, AnyMetric, Scored
from diffusers_accel.evals.report import Clip
from diffusers_accel.evals.report.findings import FLOOR
from diffusers_accel.evals.tally import SubjectTally, over_clips

IDENTICAL = "the floor is identical to dense"


def floor_rows(
    name: str,
    tally: SubjectTally,
    floor: SubjectTally,
    dense: SubjectTally,
    clips: Sequence[Clip],
    provenance: dict[str, Any],
    comparisons: int,
) -> Iterator[Measurement]:
    """Of each metric, how much worse than the floor a subject is; below 0 where it is nearer to dense than the floor."""
    prompts = [clip.prompt for clip in clips]
    for metric_name, found in tally.scores.items():
        metric = METRICS[metric_name]
        theirs = dense.scores.get(metric_name, [(None, None)] * len(found))
        far = [worse(metric, *each) for each in zip(found, floor.scores[metric_name], theirs, strict=True)]
        value, spread, note = over_clips(far, prompts, comparisons)
        yield _row(metric, name, (value, note), provenance, spread)
    for metric_name, scored in tally.sets.items():
        metric = METRICS[metric_name]
        value, note = worse(metric, scored, floor.sets[metric_name], dense.sets[metric_name])
        yield _row(metric, name, (value, note), provenance, None if value is None else Spread(1))


def _row(
    metric: AnyMetric, name: str, scored: Scored, provenance: dict[str, Any], spread: Spread | None
) -> Measurement:
    value, note = scored
    return Measurement(metric.from_floor, value, metric.unit, "lower", name, FLOOR, provenance, spread, note=note)


def worse(metric: AnyMetric, mine: Scored, floor: Scored, dense: Scored) -> Scored:
    """How much worse than the floor a value is, whichever way its metric points; none where one of them has no value, and why."""
    if mine[0] is None:
        return None, mine[1]
    if floor[0] is None:
        return None, IDENTICAL if floor[1] == "identical" else floor[1]
    if metric.better == "closer":
        return (None, dense[1]) if dense[0] is None else (abs(mine[0] - dense[0]) - abs(floor[0] - dense[0]), None)
    return (floor[0] - mine[0] if metric.better == "higher" else mine[0] - floor[0]), None
