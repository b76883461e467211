"""What must hold in a plan, whether it was made in memory or read from a file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffusers_accel.files import FileError, check_json, check_tensors, printable, quoted
from diffusers_accel.forwards import Forwards
from diffusers_accel.methods import AUTO, Correct
from diffusers_accel.plan.data import PlanData
from diffusers_accel.plan.file import MOST
from diffusers_accel.plan.span import EDGES, LONGEST_SYMBOL, SYMBOL, Span, row_text
from diffusers_accel.plan.uses import uses

SHOWN = 150  # characters of a list of symbols in a message


def check_plan(plan: PlanData) -> None:
    """Refuses the first part that is wrong with a FileError that begins with its path."""
    _check_names(plan)
    _check_spans(plan)
    for key in ("budget", "provenance"):
        if not isinstance(getattr(plan, key), Mapping):
            raise FileError(f"{key}: expected an object, found {quoted(getattr(plan, key))}")
        check_json(getattr(plan, key), key, 1)
    _check_forwards(plan)
    given: object = plan.correct
    if given is not None and not isinstance(given, Correct):
        raise FileError(f"correct: expected a correction such as MeanError() or None, found {quoted(given)}")
    _check_tensors(plan)


def names(models: Mapping[str, Any]) -> str:
    """The names of transformers, for messages."""
    found = sorted(models, key=str)
    return ", ".join(quoted(name) for name in found[:4]) + (" and others" if len(found) > 4 else "") or "no transformer"


def _check_names(plan: PlanData) -> None:
    if not isinstance(plan.family, str) or not plan.family:
        raise FileError(f'family: expected the name of a model family such as "wan", found {quoted(plan.family)}')
    check_json(plan.family, "family")
    if not plan.models:
        raise FileError("models: expected at least one transformer, found none")
    for name, shape in plan.models.items():
        if not isinstance(name, str):
            raise FileError(f"models: expected text as names of transformers, found {quoted(name)}")
        check_json(name, "models")
        for what in ("layers", "heads", "head_dim"):
            value = getattr(shape, what)
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MOST:
                raise FileError(
                    f"{_path('models', name)}.{what}: expected a whole number of 1 to {MOST:,}, found {quoted(value)}"
                )
    if not plan.methods:
        raise FileError("heads.methods: expected at least one, found none")
    for symbol, method in plan.methods.items():
        if not isinstance(symbol, str) or not SYMBOL.fullmatch(symbol):
            raise FileError(
                f"heads.methods: expected symbols of 1 to {LONGEST_SYMBOL} characters of A-Z, a-z, 0-9, '.', '_' and '-', "
                f"of which the last two do not come first, found {quoted(symbol)}"
            )
        if method.precision == AUTO:
            raise FileError(
                f'heads.methods.{symbol}: expected the precision of a device, found "{AUTO}": name one, such as "int8"'
            )


def _check_spans(plan: PlanData) -> None:
    if not plan.spans:
        raise FileError("heads.spans: expected at least one, from 0 to 1, found none")
    by = plan.spans[0].by
    edge, last = (0.0, 1.0) if by == "share" else (1.0, 0.0)
    before = "where the schedule begins"
    for index, span in enumerate(plan.spans):
        path = f"heads.spans[{index}]"
        _check_edges(span, by, path)
        start, stop = EDGES[by]
        if span.start != edge:
            wrong = "they overlap" if (span.start < edge) == (by == "share") else "there is a gap"
            raise FileError(
                f"{path}.{start}: expected {edge:g}, {before}, found {span.start:g}: {wrong}; "
                f"spans cover {1 - last:g} to {last:g} one after another"
            )
        if span.stop <= span.start if by == "share" else span.stop >= span.start:
            more = "more" if by == "share" else "less"
            raise FileError(f"{path}.{stop}: expected {more} than its {start} {span.start:g}, found {span.stop:g}")
        edge, before = span.stop, f"where spans[{index}] stops"
        _check_heads(plan, span, f"{path}.heads")
    if edge != last:
        path = f"heads.spans[{len(plan.spans) - 1}].{EDGES[by][1]}"
        raise FileError(f"{path}: expected {last:g}, the end of the schedule, found {edge:g}")


def _check_edges(span: Span, by: str, path: str) -> None:
    if span.by not in EDGES:
        raise FileError(f"{path}.by: expected one of {', '.join(EDGES)}, found {quoted(span.by)}")
    if span.by != by:
        raise FileError(
            f"{path}: expected a span by {by}, as the one before it, found one by {span.by}; all are by one of them"
        )
    what = "share of the schedule" if by == "share" else "noise level"
    for name, value in zip(EDGES[by], (span.start, span.stop)):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
            raise FileError(f"{path}.{name}: expected a {what} in 0..1, found {quoted(value)}")


def _check_heads(plan: PlanData, span: Span, path: str) -> None:
    if set(span.heads) != set(plan.models):
        raise FileError(f"{path}: expected {names(plan.models)} as in models, found {names(span.heads)}")
    for name, rows in span.heads.items():
        shape, of = plan.models[name], _path(path, name)
        if not isinstance(rows, tuple) or len(rows) != shape.layers:
            found = len(rows) if isinstance(rows, tuple) else quoted(rows)
            raise FileError(f"{of}: expected {shape.layers} rows, one per layer, found {found}")
        for layer, row in enumerate(rows):
            _check_row(plan, row, shape.heads, f"{of}[{layer}]")


def _check_row(plan: PlanData, row: object, heads: int, path: str) -> None:
    if not isinstance(row, tuple) or not all(isinstance(symbol, str) for symbol in row):
        raise FileError(f"{path}: expected {heads} symbols, one per head, found {quoted(row)}")
    text = quoted(row_text(row, plan.methods))
    if len(row) != heads:
        raise FileError(f"{path}: expected {heads} symbols, one per head, found {len(row)} in {text}")
    if unknown := sorted(set(row) - set(plan.methods)):
        known = " ".join(sorted(plan.methods))
        known = known if len(known) <= SHOWN else f"{known[:SHOWN]} ..."
        raise FileError(f"{path}: expected symbols of methods ({known}), found {quoted(unknown[0])} in {text}")


def _check_forwards(plan: PlanData) -> None:
    given: object = plan.forwards
    if given is None:
        return
    if not isinstance(given, Forwards):
        raise FileError(f"forwards: expected Forwards(rule, predictor) or None, found {quoted(given)}")
    check_json(given.to_json(), "forwards")


def _path(path: str, name: str) -> str:
    return f"{path}.{printable(name[:60])}"


def _check_tensors(plan: PlanData) -> None:
    """What the methods of each transformer read must be there and fit its layers and heads."""
    try:
        check_tensors(plan.tensors)
    except FileError as error:
        raise FileError(f"tensors.{error}") from error
    first: tuple[str, tuple[int, ...]] | None = None
    for name in plan.models:
        for each in uses(plan, name):
            method = plan.methods[each.symbol]
            method.select.check(method.order, each, plan.tensors)
            method.rest.check(each, plan.tensors)
            size = method.select.made_for(method.order, name, plan.tensors)
            if size and first and size != first[1]:
                raise FileError(
                    f"heads.methods.{each.symbol}: expected tensors for {first[1]} (segments, blocks), as those of "
                    f"methods.{first[0]} are, found {size}; search the plan again"
                )
            first = first or ((each.symbol, size) if size else None)
    if plan.correct is not None:
        for name, shape in plan.models.items():
            plan.correct.check(name, shape, len(plan.spans), plan.tensors)
