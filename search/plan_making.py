"""From an assignment to the plan file's content."""

from __future__ import annotations

import string
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffusers_accel.methods import Method, Stored
from diffusers_accel.plan import Plan, Span
from diffusers_accel.search.assign import Assignment
from diffusers_accel.search.budget import Budget
from diffusers_accel.search.cost import Cost
from diffusers_accel.search.predicted import latents_error, warnings
from diffusers_accel.search.schedule import stored_axes, stored_densities
from diffusers_accel.search.scores import Array, Scores
from diffusers_accel.search.stored_masks import stored_tensors

SYMBOLS = string.ascii_letters + string.digits[1:]  # beside "." and "0"


def make_plan(scores: Scores, cost: Cost, assignment: Assignment, budget: Budget) -> Plan:
    """The plan of an assignment, with what its methods read and where it comes from; what speaks against its use stands in
    its provenance, "warnings"."""
    methods, spans = head_strings(scores, assignment.choice)
    return Plan(
        family=scores.family,
        models=dict(scores.models),
        methods=methods,
        spans=joined_spans(spans),
        budget=budget.to_json(),
        provenance={**_provenance(scores, cost, assignment), **_order_scores(scores, assignment.choice)},
        tensors=plan_tensors(scores, assignment.choice),
    )


def head_strings(scores: Scores, choice: Mapping[str, Array]) -> tuple[dict[str, Method], list[Span]]:
    """The methods that a choice uses, by symbol, and its spans in those symbols."""
    used = _used(choice)
    symbols = dict(zip(used, _symbols([scores.candidates[index] for index in used])))
    spans = []
    for number, (start, stop) in enumerate(scores.spans):
        heads = {
            name: tuple("".join(symbols[index] for index in layer) for layer in table[number])
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
    """What the methods of a choice read: the stripes' masses, and the stored masks of the heads that use them."""
    tensors: dict[str, Tensor] = {}
    for name, table in choice.items():
        used: dict[tuple[str, str], list[int]] = {}
        for index in _used({name: table}):
            method = scores.candidates[index]
            if isinstance(method.select, Stored):
                used.setdefault(method.select.names(method.order, name), []).append(index)
            elif method.calibrated:
                tensors[f"stripe_mass/{name}"] = torch.from_numpy(scores.stripe_mass(name))
        for names, indices in used.items():
            select = scores.candidates[indices[0]].select
            assert isinstance(select, Stored)
            heads = np.asarray(np.isin(table, indices).any(axis=0))
            densities = stored_densities(scores.candidates)
            tensors |= stored_tensors(scores.sums[f"levels/{name}"], select.density, densities, heads, names)
    return tensors


def _used(choice: Mapping[str, Array]) -> list[int]:
    return sorted({int(index) for table in choice.values() for index in table.ravel()})


def _symbols(methods: list[Method]) -> list[str]:
    """ "." for dense, "0" for skip, letters for the rest in the order of the candidates."""
    if len(methods) > len(SYMBOLS):
        raise ValueError(
            f"a plan has symbols for {len(SYMBOLS)} methods, this one would use {len(methods)}: search with fewer candidates"
        )
    letters = iter(SYMBOLS)
    return ["." if method.dense else "0" if method.skips else next(letters) for method in methods]


def _provenance(scores: Scores, cost: Cost, assignment: Assignment) -> dict[str, Any]:
    return {
        "search": scores.config,
        **scores.provenance,
        "prompts": [done.prompt for done in scores.passes],
        "cost": {"device": cost.device, "tokens": cost.tokens, "batch": cost.batch, "rounds": cost.rounds},
        "span_impacts": list(scores.impacts),
        "predicted": {
            "error": assignment.error,
            "density": assignment.density,
            "attention_ratio": assignment.attention_ratio,
            "attention_share": scores.attention_share,
            "speedup": assignment.speedup,
            "latents_error": latents_error(scores, assignment.choice),
        },
        **({"warnings": found} if (found := warnings(scores, assignment)) else {}),
    }


def _order_scores(scores: Scores, choice: Mapping[str, Array]) -> dict[str, Any]:
    """Both parts of the scores by which the orders of stored masks were chosen, where a head uses one."""
    if not any(isinstance(scores.candidates[index].select, Stored) for index in _used(choice)):
        return {}
    figures = {
        kind: {name: scores.sums[f"order_{kind}/{name}"].round(4).tolist() for name in scores.models}
        for kind in ("sparse", "quant")
    }
    return {"orders": {"axes": list(stored_axes(scores.candidates)), **figures}}
