"""What is observed when: which steps of a generation measure errors, which keep an output for a later one, which choose masks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from diffusers_accel.methods import Method
from diffusers_accel.methods.blocks import segment_of
from diffusers_accel.search.recorders import recorders
from diffusers_accel.search.stored_masks import USUAL_MASKS, MaskSettings


@dataclass(frozen=True)
class ProbeSettings:
    """What a calibration run measures.

    Args:
        candidates: the first is dense.
        spans: (start, stop) fractions of the schedule.
        rows: sampled query rows per call; half of them calibrate stripes where a candidate needs that.
        probe_steps: steps per span at which errors are measured.
        seed: of the sampled rows.
        masks: how stored masks are chosen.
    """

    candidates: tuple[Method, ...]
    spans: tuple[tuple[float, float], ...]
    rows: int
    probe_steps: int
    seed: int
    masks: MaskSettings = USUAL_MASKS

    def __post_init__(self) -> None:
        if self.rows < 2 or self.probe_steps < 1:
            raise ValueError(
                f"expected at least 2 rows and 1 probe step per span, found {self.rows} and {self.probe_steps}"
            )

    @property
    def records(self) -> bool:
        """Whether a candidate reads what a calibration run records of each place of the video."""
        return bool(recorders(self.candidates))

    @property
    def splits_rows(self) -> bool:
        """Whether half of the rows are looked at for something else than errors."""
        return any(each.splits_rows for each in recorders(self.candidates))

    @property
    def in_segments(self) -> bool:
        """Whether the first calibration run chooses something for each segment of the schedule."""
        return any(each.in_segments for each in recorders(self.candidates))

    @property
    def first_run_first(self) -> bool:
        """Whether later calibration runs need what the first one has recorded."""
        return any(each.first_run_first for each in recorders(self.candidates))


@dataclass(frozen=True)
class ProbeSchedule:
    """The observed steps of a generation of `steps` steps.

    Args:
        measured: at these, errors are measured.
        kept: step -> (measured step, candidate) pairs: which candidates that keep something do so there, and for when.
        segments: step -> segment of the schedule whose masks are chosen there.
    """

    steps: int
    measured: frozenset[int]
    kept: dict[int, tuple[tuple[int, int], ...]]
    segments: dict[int, int]

    @classmethod
    def of(cls, settings: ProbeSettings, steps: int) -> ProbeSchedule:
        measured = chosen_steps(settings.spans, steps, settings.probe_steps)
        kept: dict[int, tuple[tuple[int, int], ...]] = {}
        for step in sorted(measured):
            for index, method in enumerate(settings.candidates):
                period = method.period
                if period and (age := kept_age(settings.spans, step, steps, period)):
                    kept[step - age] = (*kept.get(step - age, ()), (step, index))
        segments = mask_steps(steps, settings.masks.segments) if settings.in_segments else {}
        return cls(steps, measured, kept, segments)

    @property
    def observed(self) -> int:
        """Steps at which sampled rows are looked at; one that does so for two reasons counts twice."""
        return len(self.measured) + len(self.kept)


def span_index(spans: Sequence[tuple[float, float]], step: int, steps: int) -> int:
    """The span that a step belongs to: the one that holds its middle, as in `Plan.span_at`."""
    middle = (step + 0.5) / steps
    return next(index for index, (_, stop) in enumerate(spans) if middle < stop or index == len(spans) - 1)


def is_border(spans: Sequence[tuple[float, float]], share: float) -> bool:
    """Whether a span begins or ends at that share of the schedule."""
    return any(math.isclose(share, border, abs_tol=1e-9) for border in (*(start for start, _ in spans), 1.0))


def is_open(span: tuple[float, float], dense_steps: float) -> bool:
    """Whether heads may be sparse in a span where the first `dense_steps` of the schedule stay dense."""
    return span[0] >= dense_steps - 1e-9


def open_share(spans: Sequence[tuple[float, float]], steps: int, dense_steps: float) -> float:
    """Share of the steps at which heads may be sparse."""
    return sum(is_open(spans[span_index(spans, step, steps)], dense_steps) for step in range(steps)) / steps


def chosen_steps(spans: Sequence[tuple[float, float]], steps: int, per_span: int) -> frozenset[int]:
    """The steps at which a calibration run measures: up to `per_span` of each span, evenly spread."""
    chosen: set[int] = set()
    for span in range(len(spans)):
        inside = [step for step in range(steps) if span_index(spans, step, steps) == span]
        count = min(per_span, len(inside))
        chosen |= {inside[(2 * index + 1) * len(inside) // (2 * count)] for index in range(count)}
    return frozenset(chosen)


def kept_age(spans: Sequence[tuple[float, float]], step: int, steps: int, every: int) -> int:
    """How many steps before `step` is taken what is kept for it: half a cycle, less where the span is younger than that.

    0 at a span's first step, which refreshes: where another span begins, other heads share a method, and what was kept of
    those is of no use.
    """
    span = span_index(spans, step, steps)
    first = next(each for each in range(steps) if span_index(spans, each, steps) == span)
    return min(every // 2, step - first)


def mask_steps(steps: int, segments: int) -> dict[int, int]:
    """Of each of `segments` equal segments of the schedule the middle step; there are no more segments than steps."""
    segments = min(segments, steps)
    inside: dict[int, list[int]] = {}
    for step in range(steps):
        inside.setdefault(segment_of((step, steps), segments), []).append(step)
    return {each[len(each) // 2]: segment for segment, each in inside.items()}
