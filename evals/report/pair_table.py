"""The table of subjects against each other, clip by clip."""

from __future__ import annotations

from itertools import combinations

from diffusers_accel.evals.measurement import Measurement, Spread
from diffusers_accel.evals.metrics import AnyMetric
from diffusers_accel.evals.report import words
from diffusers_accel.evals.report.findings import Findings
from diffusers_accel.evals.report.worst import clip_name, worst_of_pair

HEADINGS = ("subjects", "of", "mean", "median", "± over clips", "95 % interval", "worst clip")
SPEED = "speed_ratio"  # metric of the rows that say how much faster the first is


def lines(report: Findings) -> list[tuple[str, ...]]:
    """One for each two subjects and each measure, in the order of `HEADINGS`: what the first has more than the second."""
    found = []
    for one, other in combinations([subject.name for subject in report.subjects], 2):
        pair = f"{one} against {other}"
        if speed := report.pair(SPEED, one, other):
            found.append((pair, "speed", *_numbers(report, speed, None)))
        for metric in words.measured(report):
            if row := report.pair(metric.difference, one, other):
                found.append((pair, metric.title, *_numbers(report, row, metric)))
    return found


def _numbers(report: Findings, row: Measurement, metric: AnyMetric | None) -> tuple[str, ...]:
    """As a ratio of speeds where `metric` is None."""
    if row.value is None or row.spread is None or row.spread.median is None:
        return f"none: {row.note}", "", "", "", ""
    form, unit = (f"+.{metric.digits}f", f" {metric.unit}".rstrip()) if metric else (".2f", "x")
    assert row.baseline
    worst = worst_of_pair(report, metric, row.subject, row.baseline)
    return (
        f"{row.value:{form}}{unit}",
        f"{row.spread.median:{form}}{unit}",
        "one clip" if row.spread.std is None else f"{row.spread.std:{form.removeprefix('+')}}",
        _interval(row.spread, form),
        f"{worst[0]:{form}}{unit} in {clip_name(worst[1])}" if worst else "",
    )


def _interval(spread: Spread, form: str) -> str:
    if spread.low is None:
        return words.TOO_FEW
    pairs = " pairs" if spread.comparisons > 1 else ""
    return f"{spread.low:{form}} to {spread.high:{form}} ({words.basis(spread)}{pairs})"
