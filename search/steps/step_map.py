"""What a scheduler does with an output, found from a recorded run: the next latents as a sum of what was known.

Most samplers of diffusers are linear in latents and outputs, once the schedule is given: Euler, DDIM, UniPC, DPM-Solver. So a few
numbers for each step say all that is needed of them, and of guidance, whose weights they hold too; no scheduler is known by name.
Noise that a sampler adds is in no regressor and stays in the residual, which the recorded run has as well: only deviations from
that run are computed with these numbers (`course`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from diffusers_accel.search.steps.samples import Part, Samples

# Steps further back that a sampler may use. UniPC of order 2 uses two: what it corrects is a sum of these.
MEMORY = 2
TOLERANCE = 1e-4  # a residual below it is rounding
WORSE = 2.0  # a longer memory has to make the residual so many times smaller
CUT = 1e-9  # singular values below it, of columns of length 1, count as 0


@dataclass(frozen=True)
class StepFit:
    """The latents of step i + 1: sum over lag of x[lag] * x_(i - lag) + v[lag][part] * v_(i - lag, part).

    Args:
        x: by lag.
        v: by lag, of each part of the outputs.
        residual: root mean square of what is left, relative to that of x_(i+1) - x_i; 0 is a perfect fit.
    """

    x: tuple[float, ...]
    v: tuple[Mapping[Part, float], ...]
    residual: float


def fit_steps(samples: Samples) -> tuple[StepFit, ...]:
    """The fits of all steps but the last one, whose result nobody is given."""
    return tuple(_fit(samples, step) for step in range(samples.steps - 1))


def _fit(samples: Samples, step: int) -> StepFit:
    """The one of the shortest memory that is about as good as longer ones."""
    found: list[StepFit] = []
    for memory in range(min(MEMORY, step) + 1):
        found.append(_solved(samples, step, memory))
        if found[-1].residual <= TOLERANCE:
            return found[-1]
    least = min(fit.residual for fit in found)
    return next(fit for fit in found if fit.residual <= WORSE * least)


def _solved(samples: Samples, step: int, memory: int) -> StepFit:
    """Least squares in fp64, with columns of length 1; where they depend on each other, the smallest solution."""
    lags = range(memory + 1)
    terms = [(lag, part) for lag in lags for part in samples.v[step - lag]]
    columns = [_flat(samples.x[step - lag]) for lag in lags]
    columns += [_flat(samples.v[step - lag][part]) for lag, part in terms]
    matrix, target = np.stack(columns, axis=1), _flat(samples.x[step + 1])
    lengths = np.linalg.norm(matrix, axis=0)
    lengths[lengths == 0] = 1.0
    solution = np.linalg.lstsq(matrix / lengths, target, rcond=CUT)[0] / lengths
    moved = float(np.linalg.norm(target - columns[0])) or float(np.linalg.norm(target)) or 1.0
    residual = float(np.linalg.norm(target - matrix @ solution)) / moved
    of_v: list[dict[Part, float]] = [{} for _ in lags]
    for (lag, part), weight in zip(terms, solution[memory + 1 :], strict=True):
        of_v[lag][part] = float(weight)
    return StepFit(tuple(float(weight) for weight in solution[: memory + 1]), tuple(of_v), residual)


def _flat(x: Tensor) -> np.ndarray:
    found: np.ndarray = x.reshape(-1).to(torch.float64).numpy()
    return found
