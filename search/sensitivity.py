"""How much an error in each span of the schedule and in each layer matters for the video: measured, as no single call shows it.

Lore says that the first steps decide everything, but what an error does to the result depends on the length of the step in
noise, on the scheduler, and on what the model does with it afterwards. So for each span the first prompt is generated once
more, with that span alone made sparse, and the final latents are compared with the dense ones, of every chunk of the video. How
that drift is shared out over the layers is measured in the same generation, at the span's measured steps (`search.layer_gains`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np
from torch import Tensor

from diffusers_accel.attach.site import Engine, Site
from diffusers_accel.call import AttentionCall
from diffusers_accel.plan import Plan
from diffusers_accel.run.engine import PlanEngine
from diffusers_accel.run.memory import CacheManager
from diffusers_accel.run.partition import Partitions
from diffusers_accel.search.knapsack import knapsack
from diffusers_accel.search.plan_making import chosen_spans, joined_spans, plan_tensors
from diffusers_accel.search.predicted import layer_errors
from diffusers_accel.search.scores import DENSE, Array, Scores

DENSITY = (
    0.3  # of the span that is made sparse: far enough from dense to be measured, not so far that the video is another
)


class Dense:
    """The engine that changes nothing."""

    def attend(self, call: AttentionCall, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        assert call.dense is not None
        return call.dense(q, k, v)


def span_choice(scores: Scores, span: int) -> dict[str, Array]:
    """The least wrong choice with which one span has about `DENSITY` and all others are dense; int [spans, layers, heads]."""
    return _sparse_in(scores, span, np.ones(len(scores.candidates), bool), by_layer=False)


def layer_choice(scores: Scores, span: int) -> dict[str, Array]:
    """As `span_choice`, but each layer has about `DENSITY`: what is done to a layer that alone is sparse. Of candidates that keep
    something of earlier steps only where there are no others."""
    usable = np.array([not method.rest.remembers for method in scores.candidates])
    if usable.sum() == 1:
        usable[:] = True
    return _sparse_in(scores, span, usable, by_layer=True)


def _sparse_in(scores: Scores, span: int, usable: Array, by_layer: bool) -> dict[str, Array]:
    choice = {}
    for name, model in scores.models.items():
        choice[name] = np.zeros((len(scores.spans), model.layers, model.heads), int)
        measured = scores.samples(name)[span] > 0
        if measured[..., DENSE].all():
            allowed = measured & usable
            error = np.where(allowed, scores.error(name)[span], np.inf)
            density = np.where(allowed, scores.density(name)[span], 1.0)
            together = range(model.layers) if by_layer else [slice(None)]
            for some in together:
                choice[name][span, some] = _about(error[some], density[some]).reshape(choice[name][span, some].shape)
    return choice


def _about(error: Array, density: Array) -> Array:
    """The least wrong options of some heads with about `DENSITY`, or the least density that they have; [..., options]."""
    items, options = error[..., 0].size, error.shape[-1]
    error, density = error.reshape(items, options), density.reshape(items, options)
    least = float(density.min(1).mean())
    return knapsack(error, density, (least + DENSITY * (1 - least)) * items).reshape(-1)


def plan_engine(scores: Scores, choice: Mapping[str, Array]) -> Callable[[Site], Engine]:
    """`make_engine` for the plan of a choice."""
    methods, spans = chosen_spans(scores, choice)
    plan = Plan(scores.family, dict(scores.models), methods, joined_spans(spans), tensors=plan_tensors(scores, choice))
    partitions = Partitions(plan.tensors)  # shared by the layers, as in a patch
    caches = CacheManager()
    return lambda site: PlanEngine(site, plan, partitions, caches)


def drift(latents: Tensor, reference: Tensor) -> float:
    """Relative squared error of the final latents, 0 or more."""
    found = float((latents - reference).square().sum() / reference.square().sum())
    if not math.isfinite(found):
        raise ValueError("the final latents are not finite: does the pipeline give a video without the search?")
    return found


def impacts(
    scores: Scores, choice: Mapping[str, Array], span: int, gains: Mapping[str, Array], moved: float
) -> dict[str, tuple[float, ...]]:
    """Of one span, per transformer and layer: relative squared error of the final latents per unit of summed error, 0 or more.

    Args:
        choice: what was done in that span.
        gains: per transformer [layers], how much an error of each layer changes the model's output; all 0 where nobody knows,
            which counts its layers alike.
        moved: the relative squared error of the final latents.
    """
    errors = {name: each[span] for name, each in layer_errors(scores, choice).items()}
    unknown = {name: errors[name].any() and not gains[name].any() for name in gains}
    gains = {name: np.ones_like(each) if unknown[name] else each for name, each in gains.items()}
    felt = sum(float(errors[name] @ gains[name]) for name in gains)
    return {name: tuple((gains[name] * (moved / felt if felt else 0.0)).tolist()) for name in gains}
