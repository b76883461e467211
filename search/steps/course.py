"""A run that predicts some steps, as its deviation from the recorded one.

What the scheduler makes of deviating outputs follows from the step map. What the model would make of deviating latents does not:
a computed step is given the recorded output, whatever the latents are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from diffusers_accel.forwards import Computed, Now, Predictor
from diffusers_accel.search.steps.samples import Part, Samples
from diffusers_accel.search.steps.step_map import MEMORY, StepFit

Deviations = Mapping[Part, Tensor]  # of outputs; a part that is left out has none


@dataclass(frozen=True, eq=False)
class Course:
    """Where a run stands before a step.

    Args:
        step: that runs next.
        known: the last computed forwards of each part, oldest first.
        dx: deviations of the latents, None for none: at this step, the one before, and so on; what is older is none.
        dv: of the outputs at the step before, and so on.
    """

    step: int
    known: Mapping[Part, tuple[Computed, ...]] = field(default_factory=dict)
    dx: tuple[Tensor | None, ...] = ()
    dv: tuple[Deviations, ...] = ()


@dataclass(frozen=True, eq=False)
class Follower:
    """Leads a run on, step by step.

    Args:
        samples, fits: of the recorded run.
        predictor: gives the outputs of predicted steps.
        looks_back: how many computed forwards are kept.
        fresh: steps before which what is known is dropped.
        free: elements that are denoised, of all in their shape; None: all are.
    """

    samples: Samples
    fits: Sequence[StepFit]
    predictor: Predictor
    looks_back: int
    fresh: tuple[int, ...] = (0,)
    free: Tensor | None = None

    def x(self, course: Course, lag: int = 0) -> Tensor:
        """The latents before this step, or `lag` steps ago."""
        recorded = self.samples.x[course.step - lag]
        deviation = course.dx[lag] if lag < len(course.dx) else None
        return recorded if deviation is None else recorded + deviation

    def deviation(self, course: Course) -> Tensor:
        """Of the latents before this step."""
        deviation = course.dx[0] if course.dx else None
        return torch.zeros_like(self.samples.x[0]) if deviation is None else deviation

    def compute(self, course: Course) -> Course:
        """The step is computed."""
        step, x = course.step, self.x(course)
        known = {} if step in self.fresh else dict(course.known)
        for part, v in self.samples.v[step].items():
            latest = Computed(step, self.samples.timesteps[step], x, v)
            known[part] = (*known.get(part, ()), latest)[-self.looks_back :]
        return self._after(course, known, {})

    def predict(self, course: Course) -> Course:
        """The step is predicted; a part of which nothing is known is computed."""
        step, x, before, dv = course.step, self.x(course), self.x(course, 1), {}
        for part, recorded in self.samples.v[step].items():
            if known := course.known.get(part):
                timestep = self.samples.timesteps[step]
                now = Now(step, self.samples.steps, step, part[0], timestep, x, before, known)
                dv[part] = self.predictor.predict(now) - recorded
        return self._after(course, course.known, dv)

    def _after(self, course: Course, known: Mapping[Part, tuple[Computed, ...]], dv: Deviations) -> Course:
        """The step gave outputs with these deviations."""
        dvs = (dv, *course.dv)
        if course.step == self.samples.steps - 1:  # of which the recorded run has no further latents
            return Course(course.step + 1, known)
        fit = self.fits[course.step]
        terms = [(weight, dx) for weight, dx in zip(fit.x, course.dx) if dx is not None]
        terms += [(weights[part], each[part]) for weights, each in zip(fit.v, dvs) for part in each]
        moved: Tensor | None = None
        for weight, deviation in terms:
            moved = weight * deviation if moved is None else moved.add(deviation, alpha=weight)
        if moved is not None and self.free is not None:
            moved = moved * self.free
        return Course(course.step + 1, known, (moved, *course.dx)[: MEMORY + 1], dvs[:MEMORY])
