"""Which metrics can be measured on this machine, as a table for a terminal."""

from __future__ import annotations

from collections.abc import Iterable

from diffusers_accel.evals.metrics.metric import AnyMetric, MetricUnavailable
from diffusers_accel.files import printable


def readiness(metrics: Iterable[AnyMetric]) -> str:
    """A line for each: name, unit, range, direction, and "ready" or why not, with what helps."""
    rows = [("metric", "unit", "range", "better", "here")]
    rows += [(each.name, each.unit or "-", each.range, each.better, _here(each)) for each in metrics]
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(f"{cell:{width}}" for cell, width in zip(row, widths)).rstrip() for row in rows)


def _here(metric: AnyMetric) -> str:
    try:
        metric.load()
    except MetricUnavailable as reason:
        return printable(reason)
    return "ready"
