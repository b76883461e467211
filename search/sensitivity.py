"""How much an error in each span of the schedule matters for the video: measured, because it cannot be seen in one call.

Lore says that the first steps decide everything, but what an error does to the result depends on the length of the step in
noise, on the scheduler, and on what the model does with it afterwards. So for each span the first prompt is generated once
more, with that span alone made sparse, and the final latents are compared with the dense ones, of every chunk of the video.
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
from diffusers_accel.search.predicted import span_errors
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
    choice = {}
    for name, model in scores.models.items():
        choice[name] = np.zeros((len(scores.spans), model.layers, model.heads), int)
        measured = (scores.samples(name)[span] > 0).reshape(-1, len(scores.candidates))
        if measured[:, DENSE].all():
            error, density = (each(name)[span].reshape(measured.shape) for each in (scores.error, scores.density))
            error, density = np.where(measured, error, np.inf), np.where(measured, density, 1.0)
            least = float(density.min(1).mean())
            found = knapsack(error, density, (least + DENSITY * (1 - least)) * len(density))
            choice[name][span] = found.reshape(model.layers, model.heads)
    return choice


def plan_engine(scores: Scores, choice: Mapping[str, Array]) -> Callable[[Site], Engine]:
    """`make_engine` for the plan of a choice."""
    methods, spans = chosen_spans(scores, choice)
    plan = Plan(scores.family, dict(scores.models), methods, joined_spans(spans), tensors=plan_tensors(scores, choice))
    partitions = Partitions(plan.tensors)  # shared by the layers, as in a patch
    caches = CacheManager()
    return lambda site: PlanEngine(site, plan, partitions, caches)


def impact(scores: Scores, choice: Mapping[str, Array], latents: Tensor, reference: Tensor) -> float:
    """Relative squared error of the final latents per unit of summed error, 0 or more."""
    drift = float((latents - reference).square().sum() / reference.square().sum())
    if not math.isfinite(drift):
        raise ValueError("the final latents are not finite: does the pipeline give a video without the search?")
    return drift / float(span_errors(scores, choice).sum())
