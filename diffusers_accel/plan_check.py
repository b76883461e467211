"""What must hold in a plan, whether it was made in memory or read from a file."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from diffusers_accel.files import FileError, check_json
from diffusers_accel.methods import Stored, Stripe
from diffusers_accel.shape import ModelShape

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
    """What the methods of each transformer read must be there and fit its layers and heads."""
    for name, shape in plan.models.items():
        rows = [row for span in plan.spans for row in span.heads[name]]
        for symbol in sorted({symbol for row in rows for symbol in row}):
            method = plan.methods[symbol]
            if isinstance(method.select, Stripe) and method.select.calibrated:
                _check_mass(_tensor(plan, f"stripe_mass/{name}", symbol), f"stripe_mass/{name}", shape)
            if isinstance(method.select, Stored):
                _check_stored(plan, name, symbol, method.select.names(method.order, name))
            if method.reuse and method.reuse.gated:
                _check_gate(_tensor(plan, f"refresh/{name}", symbol), f"refresh/{name}", shape)


def _tensor(plan: Plan, key: str, symbol: str) -> Tensor:
    if key not in plan.tensors:
        found = ", ".join(sorted(plan.tensors)) or "none"
        raise FileError(
            f"tensors: expected {key!r}, which the method {symbol!r} reads, found {found}; "
            f"search the plan again, or leave out {plan.methods[symbol].label!r}"
        )
    return plan.tensors[key]


def _check_mass(mass: Tensor, key: str, shape: ModelShape) -> None:
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


def _check_stored(plan: Plan, transformer: str, symbol: str, keys: tuple[str, str]) -> None:
    """The masks, which of them each head takes, and that every head of the method has one."""
    bits, heads = (_tensor(plan, key, symbol) for key in keys)
    if bits.dtype != torch.uint8 or bits.dim() != 4 or 0 in bits.shape or bits.shape[3] != -(-bits.shape[2] // 8):
        raise FileError(
            f"tensors.{keys[0]}: expected uint8 [masks, parts, blocks, blocks / 8, rounded up], "
            f"found {bits.dtype} {list(bits.shape)}"
        )
    shape = plan.models[transformer]
    if heads.dtype != torch.int32 or heads.shape != (shape.layers, shape.heads):
        raise FileError(
            f"tensors.{keys[1]}: expected int32 [{shape.layers} layers, {shape.heads} heads], "
            f"found {heads.dtype} {list(heads.shape)}"
        )
    lowest, highest = int(heads.min()), int(heads.max())
    if lowest < -1 or highest >= len(bits):
        raise FileError(
            f"tensors.{keys[1]}: expected -1 or the number of one of {len(bits)} masks, found {lowest} to {highest}"
        )
    for span in plan.spans:
        for layer, row in enumerate(span.heads[transformer]):
            for head, used in enumerate(row):
                if used == symbol and heads[layer, head] < 0:
                    raise FileError(
                        f"tensors.{keys[1]}: expected a mask for head {head} of layer {layer}, which takes the method "
                        f"{symbol!r}, found none; search the plan again"
                    )


def _check_gate(gate: Tensor, key: str, shape: ModelShape) -> None:
    if gate.dtype != torch.uint8 or gate.dim() != 3 or gate.shape[1:] != (shape.layers, shape.heads) or not len(gate):
        raise FileError(
            f"tensors.{key}: expected uint8 [parts, {shape.layers} layers, {shape.heads} heads], "
            f"found {gate.dtype} {list(gate.shape)}"
        )
    if int(gate.max()) > 1:
        raise FileError(f"tensors.{key}: expected 1 where a head refreshes and 0 elsewhere, found {int(gate.max())}")
