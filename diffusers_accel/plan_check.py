"""What must hold in a plan, whether it was made in memory or read from a file."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from diffusers_accel.files import FileError, check_json

if TYPE_CHECKING:
    from diffusers_accel.plan import Plan, Span

_SYMBOL = re.compile(r"[A-Za-z0-9.]")


def check_plan(plan: Plan) -> None:
    """Refuses the first part that is wrong with a FileError that begins with its path."""
    _check_names(plan)
    _check_spans(plan)
    _check_tensors(plan)
    check_json(plan.budget, "budget")
    check_json(plan.provenance, "provenance")


def names(models: Mapping[str, Any]) -> str:
    """The names of transformers, for messages."""
    return ", ".join(repr(name) for name in sorted(models)) or "no transformer"


def _check_names(plan: Plan) -> None:
    if not isinstance(plan.family, str) or not plan.family:
        raise FileError(f'family: expected the name of a model family such as "wan", found {plan.family!r}')
    if not plan.models:
        raise FileError("models: expected at least one transformer, found none")
    for name, shape in plan.models.items():
        for what in ("layers", "heads", "head_dim"):
            value = getattr(shape, what)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise FileError(f"models.{name}.{what}: expected a whole number of at least 1, found {value!r}")
    if not plan.methods:
        raise FileError("methods: expected at least one, found none")
    for symbol in plan.methods:
        if not isinstance(symbol, str) or not _SYMBOL.fullmatch(symbol):
            raise FileError(f'methods: expected symbols of one character of A-Z, a-z, 0-9 or ".", found {symbol!r}')


def _check_spans(plan: Plan) -> None:
    if not plan.spans:
        raise FileError("spans: expected at least one, from 0 to 1, found none")
    edge, before = 0.0, "where the schedule begins"
    for index, span in enumerate(plan.spans):
        path = f"spans[{index}]"
        for what in ("start", "stop"):
            value = getattr(span, what)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
                raise FileError(f"{path}.{what}: expected a share of the schedule in 0..1, found {value!r}")
        if span.start != edge:
            wrong = "they overlap" if span.start < edge else "there is a gap"
            raise FileError(
                f"{path}.start: expected {edge:g}, {before}, found {span.start:g}: {wrong}; spans cover 0 to 1 one after another"
            )
        if span.stop <= span.start:
            raise FileError(f"{path}.stop: expected more than its start {span.start:g}, found {span.stop:g}")
        edge, before = span.stop, f"where {path} stops"
        _check_heads(plan, span, f"{path}.heads")
    if edge != 1:
        raise FileError(f"spans[{len(plan.spans) - 1}].stop: expected 1, the end of the schedule, found {edge:g}")


def _check_heads(plan: Plan, span: Span, path: str) -> None:
    if set(span.heads) != set(plan.models):
        raise FileError(f"{path}: expected {names(plan.models)} as in models, found {names(span.heads)}")
    for name, rows in span.heads.items():
        shape = plan.models[name]
        if len(rows) != shape.layers:
            raise FileError(f"{path}.{name}: expected {shape.layers} strings, one per layer, found {len(rows)}")
        for layer, row in enumerate(rows):
            where = f"{path}.{name}[{layer}]"
            if not isinstance(row, str) or len(row) != shape.heads:
                found = f"{len(row)} in {row!r}" if isinstance(row, str) else repr(row)
                raise FileError(f"{where}: expected {shape.heads} symbols, one per head, found {found}")
            if unknown := sorted(set(row) - set(plan.methods)):
                known = " ".join(sorted(plan.methods))
                raise FileError(f"{where}: expected symbols of methods ({known}), found {unknown[0]!r} in {row!r}")


def _check_tensors(plan: Plan) -> None:
    calibrated = {symbol for symbol, method in plan.methods.items() if method.calibrated}
    for name, shape in plan.models.items():
        used = calibrated & {symbol for span in plan.spans for row in span.heads[name] for symbol in row}
        if not used:
            continue
        key = f"stripe_mass/{name}"
        if key not in plan.tensors:
            found = ", ".join(sorted(plan.tensors)) or "none"
            raise FileError(
                f"tensors: expected {key!r}, which the method {min(used)!r} reads, found {found}; "
                f"search the plan again, or leave out its calibrated stripes"
            )
        mass = plan.tensors[key]
        if (
            mass.dim() != 4
            or mass.shape[:2] != (shape.layers, shape.heads)
            or 0 in mass.shape
            or not mass.is_floating_point()
        ):
            raise FileError(
                f"tensors.{key}: expected a floating [{shape.layers} layers, {shape.heads} heads, frames, height], "
                f"found {mass.dtype} {list(mass.shape)}"
            )
        if not bool(torch.isfinite(mass).all()):
            raise FileError(f"tensors.{key}: expected finite numbers, found NaN or infinity")
