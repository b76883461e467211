"""From an assignment to the plan file's content."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffusers_accel.methods import MeanError, Method, Order, Select
from diffusers_accel.plan import Plan, Span
from diffusers_accel.plan.span import new_symbols
from diffusers_accel.search.assignment import Assignment
from diffusers_accel.search.budget import Budget
from diffusers_accel.search.cost import Cost
from diffusers_accel.search.predicted import latents_error, warnings
from diffusers_accel.search.recorders import RECORDERS, recorders
from diffusers_accel.search.scores import Array, Scores


def make_plan(scores: Scores, cost: Cost, assignment: Assignment, budget: Budget, correct: bool = False) -> Plan:
    """The plan of an assignment, with what its methods read and where it comes from; what speaks against its use stands in
    its provenance, "warnings".

    Args:
        correct: subtract the mean error of each head, where its method keeps nothing of earlier steps. What is predicted is so
            without that.
    """
    methods, spans = chosen_spans(scores, assignment.choice)
    tensors = plan_tensors(scores, assignment.choice)
    return Plan(
        family=scores.family,
        models=dict(scores.models),
        methods=methods,
        spans=tuple(spans) if correct else joined_spans(spans),  # each span has mean errors of its own
        budget=budget.to_json(),
        provenance={**_provenance(scores, cost, assignment, methods), **_recorded(scores, assignment.choice)},
        tensors={**tensors, **mean_errors(scores, assignment.choice)} if correct else tensors,
        forwards=assignment.steps.forwards if assignment.steps else None,
        correct=MeanError() if correct else None,
    )


def mean_errors(scores: Scores, choice: Mapping[str, Array]) -> dict[str, Tensor]:
    """What a plan of a choice is corrected by. A head that keeps an output has none: its error grows from refresh to refresh."""
    found = {}
    corrected = np.array([not (method.dense or method.rest.remembers) for method in scores.candidates])
    for name, table in choice.items():
        vectors = np.take_along_axis(scores.mean_error(name), table[..., None, None], 3)[..., 0, :]
        found[MeanError.tensor(name)] = torch.from_numpy(vectors * corrected[table][..., None].astype("f4"))
    return found


def chosen_spans(scores: Scores, choice: Mapping[str, Array]) -> tuple[dict[str, Method], list[Span]]:
    """The methods that a choice uses, by symbol, and its spans in those symbols."""
    used = _used(choice)
    symbols = dict(zip(used, _symbols([scores.candidates[index] for index in used])))
    spans = []
    for number, (start, stop) in enumerate(scores.spans):
        heads = {
            name: tuple(tuple(symbols[index] for index in layer) for layer in table[number])
            for name, table in choice.items()
        }
        spans.append(Span(start, stop, heads))
    return {symbols[index]: scores.candidates[index] for index in used}, spans


def joined_spans(spans: list[Span]) -> tuple[Span, ...]:
    """Neighbours that decide alike as one span."""
    joined = spans[:1]
    for span in spans[1:]:
        if span.heads == joined[-1].heads:
            joined[-1] = Span(joined[-1].start, span.stop, span.heads)
        else:
            joined.append(span)
    return tuple(joined)


def plan_tensors(scores: Scores, choice: Mapping[str, Array]) -> dict[str, Tensor]:
    """What the methods of a choice read, for the heads that take them."""
    tensors: dict[str, Tensor] = {}
    for name, table in choice.items():
        readers: dict[tuple[Select, Order], list[int]] = {}
        for index in _used({name: table}):
            method = scores.candidates[index]
            if method.select.records:
                readers.setdefault((method.select, method.order), []).append(index)
        for indices in readers.values():
            method = scores.candidates[indices[0]]
            heads = np.asarray(np.isin(table, indices).any(axis=0))
            recorder = RECORDERS[str(method.select.records)]
            tensors |= recorder.tensors(scores.candidates, scores.sums, name, method, heads)
    return tensors


def _used(choice: Mapping[str, Array]) -> list[int]:
    return sorted({int(index) for table in choice.values() for index in table.ravel()})


def _symbols(methods: list[Method]) -> list[str]:
    """ "." for dense, "0" for skip, new ones for the rest in the order of the candidates."""
    unused = new_symbols()
    return ["." if method.dense else "0" if method.skips else next(unused) for method in methods]


def _provenance(scores: Scores, cost: Cost, assignment: Assignment, methods: Mapping[str, Method]) -> dict[str, Any]:
    return {
        "search": scores.config,
        **scores.provenance,
        "prompts": [done.prompt for done in scores.runs],
        "cost": {
            "device": cost.device,
            "tokens": cost.tokens,
            "batch": cost.batch,
            "rounds": cost.rounds,
            "ms": {name: _times(scores, cost, name, methods) for name in scores.models},
        },
        "impacts": {name: scores.measured_impacts(name).tolist() for name in scores.models},
        "predicted": {
            "error": assignment.error,
            "density": assignment.density,
            "attention_ratio": assignment.attention_ratio,
            "attention_share": scores.attention_share,
            "speedup": assignment.speedup,
            "latents_error": latents_error(scores, assignment),
            **({"steps_error": assignment.steps.error} if assignment.steps else {}),
        },
        **_optimality(assignment),
        **({"warnings": found} if (found := warnings(scores, assignment)) else {}),
    }


def _optimality(assignment: Assignment) -> dict[str, Any]:
    """How far the choice may be from the best one, where that is known: of the predicted error, no choice is below the bound."""
    if assignment.bound is None:
        return {}
    return {"assignment": {"error": assignment.total(), "bound": assignment.bound, "gap": assignment.gap}}


def _times(scores: Scores, cost: Cost, transformer: str, methods: Mapping[str, Method]) -> dict[str, list[float]]:
    """Symbol -> ms of one head in a usual call, and in one that refreshes: by these heads are dealt over devices."""
    places = {symbol: scores.candidates.index(method) for symbol, method in methods.items()}
    return {symbol: [cost.ms[transformer][at], cost.refresh_ms[transformer][at]] for symbol, at in places.items()}


def _recorded(scores: Scores, choice: Mapping[str, Array]) -> dict[str, Any]:
    """What the recorders of the used methods tell."""
    used = [scores.candidates[index] for index in _used(choice)]
    found: dict[str, Any] = {}
    for recorder in recorders(used):
        found |= recorder.provenance(scores.candidates, scores.sums, list(scores.models))
    return found
