"""Which metrics can be measured on this machine, as a table for a terminal."""

from __future__ import annotations

from collections.abc import Iterable

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from diffusers_accel.evals.metrics.metric import AnyMetric, MetricUnavailable
from diffusers_accel.files import printable


def readiness(metrics: Iterable[AnyMetric]) -> Table:
    """A line for each: name, unit, range, direction, and "ready" or why not, with what helps."""
    table = Table("metric", "unit", "range", "better", "here", box=SIMPLE_HEAD, pad_edge=False)
    table.columns[0].no_wrap = True
    for each in metrics:
        table.add_row(
            each.name, each.unit or "-", each.range, each.better, Text(_here(each))
        )  # in which nothing is markup
    return table


def _here(metric: AnyMetric) -> str:
    try:
        metric.load()
    except MetricUnavailable as reason:
        return printable(reason)
    return "ready"
