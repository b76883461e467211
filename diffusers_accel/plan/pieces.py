"""Stretches of the schedule in which each of two plans stays in one of its spans."""

from __future__ import annotations

from dataclasses import dataclass

from diffusers_accel.plan.data import PlanData
from diffusers_accel.plan.span import Span


@dataclass(frozen=True)
class Piece:
    """One such stretch.

    Args:
        start, stop: as of a span.
        first, second: the spans of the two plans that hold it, by their indices.
    """

    start: float
    stop: float
    first: int
    second: int


def pieces(first: PlanData, second: PlanData) -> list[Piece]:
    """The schedule, cut wherever one of two plans begins a span; both have spans by share, or both by sigma."""
    edges = sorted(
        {edge for plan in (first, second) for span in plan.spans for edge in (span.start, span.stop)},
        reverse=first.spans[0].by == "sigma",
    )
    found = []
    for start, stop in zip(edges, edges[1:]):
        middle = (start + stop) / 2
        found.append(Piece(start, stop, holder(first.spans, middle), holder(second.spans, middle)))
    return found


def holder(spans: tuple[Span, ...], at: float) -> int:
    """The index of the span that holds a share of the schedule, or a noise level, that is no border."""
    return next(
        index for index, span in enumerate(spans) if min(span.start, span.stop) < at < max(span.start, span.stop)
    )
