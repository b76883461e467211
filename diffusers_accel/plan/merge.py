"""One plan of two: the step cache of one of them, and heads of both."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from diffusers_accel.files import quoted
from diffusers_accel.methods import Method
from diffusers_accel.plan.check import names
from diffusers_accel.plan.plan import Plan, PlanError
from diffusers_accel.plan.span import Row, Span, new_symbols
from diffusers_accel.plan.told import told

Which = Literal["first", "second"]
# What a search tells of the model and of the call that it measured, and how a message calls it.
SAME = {
    ("search", "weights"): "weights (their fingerprint)",
    ("search", "call"): "call (size, frames, steps, guidance)",
    ("layout",): "layout of the tokens",
}
KEPT = ("search", "layout", "diffusers_accel", "diffusers", "torch", "python", "device")


def merge_plans(
    first: Plan,
    second: Plan,
    *,
    forwards: Which = "first",
    until: float | None = None,
    labels: tuple[str, str] = ("first", "second"),
) -> Plan:
    """The step cache of the first plan with the heads of the second; or heads by spans.

    What was asked for, predicted or measured of either plan does not hold for what is made of them: that has no budget, and of
    its provenance only the facts about the model and the call. No times of heads, by which devices deal them, go along either.

    Args:
        forwards: whose step cache is taken; that plan may have none.
        until: heads are the first plan's up to this border and the second's from there on: a share of the steps, or, for plans
            with spans by sigma, a noise level, between 0 and 1. None: all are the second's.
        labels: of the two plans, for the provenance.

    Raises:
        PlanError: the plans are for other models, or were searched for other weights or another call; or, with `until`, their
            heads read tensors that do not go together. What a plan does not tell is not compared.
        ValueError: an argument is wrong.
    """
    if forwards not in ("first", "second"):
        raise ValueError(f'forwards: expected "first" or "second", found {quoted(forwards)}')
    _check_same(first, second)
    chosen = first.forwards if forwards == "first" else second.forwards
    facts = {key: value for key in KEPT if (value := told(second, key) or told(first, key)) is not None}
    merged = {"forwards": labels[forwards == "second"], "heads": labels[1] if until is None else list(labels)}
    origin = {"merged": {**merged, **({} if until is None else {"until": until})}, **facts}
    if until is None:
        return replace(second, forwards=chosen, budget={}, provenance=origin)
    _check_parts(first, second, until)
    renamed, methods = _renamed(first, second)
    spans = (*_before(first.spans, until), *_behind(renamed, until))
    used = {symbol for span in spans for rows in span.heads.values() for row in rows for symbol in row}
    return Plan(
        family=first.family,
        models=dict(first.models),
        methods={symbol: method for symbol, method in methods.items() if symbol in used},
        spans=spans,
        provenance=origin,
        tensors=_tensors(first.tensors, second.tensors),
        forwards=chosen,
    )


def _check_same(first: Plan, second: Plan) -> None:
    if first.family != second.family:
        raise PlanError(
            f"expected plans for one family, found {quoted(first.family)} and {quoted(second.family)}: plans of different models "
            "have no heads in common"
        )
    if first.models != second.models:
        found = " and ".join(f"{names(each.models)} ({_sizes(each)})" for each in (first, second))
        raise PlanError(f"expected plans for transformers of the same sizes, found {found}: search both on one model")
    for path, what in SAME.items():
        mine, theirs = told(first, *path), told(second, *path)
        if mine is not None and theirs is not None and mine != theirs:
            mine, theirs = _told_apart(mine, theirs)
            raise PlanError(
                f"expected plans that were searched with the same {what}, found {quoted(mine)} and {quoted(theirs)}: what "
                "suits one does not have to suit the other; search both for the same"
            )


def _told_apart(mine: Any, theirs: Any) -> tuple[Any, Any]:
    """Of two objects the entries that differ."""
    if not (isinstance(mine, Mapping) and isinstance(theirs, Mapping)):
        return mine, theirs
    keys = [key for key in {**mine, **theirs} if mine.get(key) != theirs.get(key)]
    mine, theirs = ({key: each[key] for key in keys if key in each} for each in (mine, theirs))
    return mine, theirs


def _sizes(plan: Plan) -> str:
    return "; ".join(f"{each.layers} x {each.heads} x {each.head_dim}" for each in plan.models.values())


def _check_parts(first: Plan, second: Plan, until: float) -> None:
    """What has to hold for the heads of two plans to follow one another."""
    if isinstance(until, bool) or not isinstance(until, (int, float)) or not 0 < until < 1:
        raise ValueError(
            f"until: expected a share of the steps, or a noise level, between 0 and 1, found {quoted(until)}"
        )
    if first.by != second.by:
        raise PlanError(
            "expected plans that both have spans by share of the steps, or both by sigma, found one of each: leave until out, "
            "and all heads are the second plan's"
        )
    if first.correct or second.correct:
        raise PlanError(
            "expected plans without a correction, found one, whose tensor has a vector for each span of its own plan: leave "
            "until out, or search again without --correct"
        )


def _renamed(first: Plan, second: Plan) -> tuple[tuple[Span, ...], dict[str, Method]]:
    """The second plan's spans in symbols that mean the same in both plans, and what they mean."""
    methods = dict(first.methods)
    known = {method: symbol for symbol, method in first.methods.items()}
    unused = (each for each in new_symbols() if each not in first.methods and each not in second.methods)
    symbols = {}
    for symbol, method in second.methods.items():
        symbols[symbol] = known.get(method) or (next(unused) if symbol in methods else symbol)
        methods[symbols[symbol]] = method

    def row(given: Row) -> Row:
        return tuple(symbols[symbol] for symbol in given)

    spans = tuple(
        replace(span, heads={name: tuple(map(row, rows)) for name, rows in span.heads.items()}) for span in second.spans
    )
    return spans, methods


def _before(spans: tuple[Span, ...], edge: float) -> list[Span]:
    """The part of the schedule up to a border."""
    sign = 1 if spans[0].by == "share" else -1
    kept = [span for span in spans if sign * span.start < sign * edge]
    return [replace(span, stop=edge) if sign * span.stop > sign * edge else span for span in kept]


def _behind(spans: tuple[Span, ...], edge: float) -> list[Span]:
    """The part of the schedule from a border on."""
    sign = 1 if spans[0].by == "share" else -1
    kept = [span for span in spans if sign * span.stop > sign * edge]
    return [replace(span, start=edge) if sign * span.start < sign * edge else span for span in kept]


def _tensors(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> dict[str, Tensor]:
    for name in first.keys() & second.keys():
        mine, theirs = first[name], second[name]
        if mine.dtype != theirs.dtype or not torch.equal(mine, theirs):
            raise PlanError(
                f"tensors.{name}: expected the same in both plans, found two different ones, of which a plan holds one: leave "
                "until out, and all heads are the second plan's"
            )
    return {**first, **second}
