"""What must hold of scores, whether they were just measured or read from a file."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from diffusers_accel.files import FileError, check_json, printable, quoted
from diffusers_accel.search.scores_data import ScoresData
from diffusers_accel.search.scores_file import Array, CalibrationRun

MOST_TOKENS = 2**31 - 1
MOST_STEPS = 100_000  # of a span: what is above it is a mistake
SHARE = 1 + 1e-6  # sums of shares are rounded


def check_scores(scores: ScoresData, arrays: Mapping[str, tuple[tuple[int, ...], str]]) -> None:
    """Refuses the first part that is wrong.

    Args:
        arrays: shape and dtype of every array of `sums`.

    Raises:
        FileError: the message begins with the path of the part.
    """
    _check_shapes(scores)
    _check_spans(scores)
    for name in ("config", "provenance"):
        check_json(getattr(scores, name), name, 1)
    for index, done in enumerate(scores.runs):
        _check_run(scores, done, f"passes[{index}]")  # as files call it
    _check_impacts(scores)
    _check_names(scores, arrays)
    for name, (shape, kind) in arrays.items():
        _check_array(scores.sums[name], f"sums.{name}", shape, kind)
    for name in scores.models:
        density, samples = scores.sums[f"density/{name}"], scores.sums[f"samples/{name}"]
        if (density > samples * SHARE).any():
            raise FileError(f"{_path('sums', f'density/{name}')}: expected at most 1 a sample, found more")
        if (density[..., 0] * SHARE < samples[..., 0]).any():
            raise FileError(f"{_path('sums', f'density/{name}')}: expected 1 a sample of dense attention, found less")


def check_size(scores: ScoresData) -> None:
    """Before the shapes of arrays follow from them."""
    layout = scores.layout
    if layout.tokens > MOST_TOKENS:
        raise FileError(f"layout: expected at most {MOST_TOKENS:,} tokens, found {layout.tokens:,}")
    if not isinstance(scores.segments, int) or not 0 <= scores.segments <= MOST_STEPS:
        raise FileError(
            f"parts: expected 0 to {MOST_STEPS:,} segments of the schedule, found {quoted(scores.segments)}"
        )


def _check_shapes(scores: ScoresData) -> None:
    if not scores.family:
        raise FileError("family: expected the name of a model family, found none")
    if not scores.models:
        raise FileError("models: expected at least one transformer, found none")
    for name, shape in scores.models.items():
        for what, value in vars(shape).items():
            if value < 1:
                raise FileError(f"{_path('models', name)}.{what}: expected 1 or more, found {quoted(value)}")
    if not scores.candidates or not scores.candidates[0].dense:
        found = scores.candidates[0].label if scores.candidates else "none"
        raise FileError(f"candidates[0]: expected dense attention, found {found}")
    if len(set(scores.candidates)) != len(scores.candidates):
        raise FileError("candidates: expected each method once, found one twice")


def _check_spans(scores: ScoresData) -> None:
    edge = 0.0
    for index, (start, stop) in enumerate(scores.spans):
        if not (start == edge < stop <= 1):
            raise FileError(
                f"spans[{index}]: expected one that begins at {edge:g} and ends later, at most at 1, "
                f"found {start:g} to {stop:g}"
            )
        edge = stop
    if edge != 1:
        raise FileError(f"spans: expected an end at 1, found {edge:g}")


def _check_run(scores: ScoresData, done: CalibrationRun, path: str) -> None:
    for what in ("seconds", "attention_seconds"):
        value = getattr(done, what)
        if not math.isfinite(value) or value <= 0:
            raise FileError(f"{path}.{what}: expected a finite time, above 0, found {quoted(value)}")
    for what in ("calls", "steps"):
        counts: Mapping[str, tuple[int, ...]] = getattr(done, what)
        if set(counts) != set(scores.models):
            expected, found = (quoted(sorted(each)) for each in (scores.models, counts))
            raise FileError(f"{path}.{what}: expected the transformers {expected}, found {found}")
        for name, row in counts.items():
            if len(row) != len(scores.spans):
                raise FileError(
                    f"{_path(f'{path}.{what}', name)}: expected {len(scores.spans)} counts, one per span, found {len(row)}"
                )
            if min(row) < 0 or max(row) > MOST_STEPS:
                raise FileError(
                    f"{_path(f'{path}.{what}', name)}: expected counts of 0 to {MOST_STEPS:,}, found {quoted(row)}"
                )
    if not 0 <= done.chunk <= MOST_STEPS:
        raise FileError(f"{path}.chunk: expected 0 to {MOST_STEPS:,}, found {quoted(done.chunk)}")
    if not any(sum(row) for row in done.calls.values()):
        raise FileError(f"{path}.calls: expected calls of self-attention in one of the spans, found none")


def _check_impacts(scores: ScoresData) -> None:
    if len(scores.impacts) > len(scores.spans):
        raise FileError(f"impacts: expected at most {len(scores.spans)}, one per span, found {len(scores.impacts)}")
    for index, span in enumerate(scores.impacts):
        if set(span) != set(scores.models):
            expected, found = (quoted(sorted(each)) for each in (scores.models, span))
            raise FileError(f"impacts[{index}]: expected the transformers {expected}, found {found}")
        for name, row in span.items():
            layers = scores.models[name].layers
            if len(row) != layers or not all(math.isfinite(each) and each >= 0 for each in row):
                path = _path(f"impacts[{index}]", name)
                raise FileError(
                    f"{path}: expected {layers} finite numbers of 0 or more, one per layer, found {quoted(row)}"
                )


def _check_names(scores: ScoresData, arrays: Mapping[str, object]) -> None:
    if missing := sorted(set(arrays) - set(scores.sums)):
        raise FileError(f"sums: expected the array {quoted(missing[0])}, found none of that name")
    if unknown := sorted(set(scores.sums) - set(arrays)):
        raise FileError(f"sums: expected no array {quoted(unknown[0])}, found one")


def _check_array(array: Array, path: str, shape: tuple[int, ...], kind: str) -> None:
    path = printable(path)[:200]
    if array.shape != shape or array.dtype != np.dtype(kind):
        raise FileError(f"{path}: expected {np.dtype(kind)} {quoted(shape)}, found {array.dtype} {quoted(array.shape)}")
    if kind in ("f4", "f8") and not np.isfinite(array).all():
        raise FileError(f"{path}: expected finite numbers, found NaN or infinity")
    if kind not in ("u1", "f4") and array.size and array.min() < 0:
        raise FileError(f"{path}: expected sums of 0 or more, found {array.min():g}")


def _path(path: str, name: str) -> str:
    return f"{path}.{printable(name[:60])}"
