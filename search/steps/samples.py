"""A recorded run as errors are worked out on it: in fp32, with its batches of guidance taken apart."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusers_accel.forwards import Computed, Now, Predictor
from diffusers_accel.search.steps.spectrum import cosine_transform, kept_frequencies
from diffusers_accel.search.steps.trajectory import Trajectory, TrajectoryStep

MOST = 1 << 18  # coefficients of a row and channel's latents together
Part = tuple[str, int]  # a branch of guidance, and which of the parts of its batch


@dataclass(frozen=True, eq=False)
class Samples:
    """The latents and outputs of every step.

    Args:
        x: [steps, ...] fp32.
        v: of each step, by part, in the order in which they ran: [...] fp32.
        timesteps: [steps] fp32.
    """

    x: Tensor
    v: tuple[Mapping[Part, Tensor], ...]
    timesteps: Tensor

    @property
    def steps(self) -> int:
        return len(self.x)


def coefficients(trajectory: Trajectory) -> Samples:
    """Of elements that are denoised, as cosine coefficients: for what is linear and treats all elements alike. Of large latents
    the coarse ones, at most about `MOST`, in which nearly all of an error lies."""
    return _samples(trajectory, coefficients_of(trajectory))


def whole(trajectory: Trajectory) -> Samples:
    """All elements, in their shape: for what looks at how they lie."""
    return _samples(trajectory, lambda x: x.float())


def coefficients_of(trajectory: Trajectory) -> Callable[[Tensor], Tensor]:
    """What `coefficients` makes of latents or outputs."""
    free, shape = denoised(trajectory), trajectory.steps[0].x.shape
    axes = trajectory.axes
    keep = kept_frequencies([shape[axis] for axis in axes], MOST // (shape[0] * shape[trajectory.channels]))
    return lambda x: cosine_transform(x.float() * free, axes, keep)


def denoised(trajectory: Trajectory) -> Tensor:
    """bool, of the shape of the latents: elements that change. Others are held, as the frame of an image that is animated.

    Raises:
        ValueError: none does.
    """
    first, *others = (step.x for step in trajectory.steps)
    changes = torch.full_like(first, not others, dtype=torch.bool)  # of one step nothing is known
    for other in others:
        changes |= other != first
    if not changes.any():
        raise ValueError("expected latents that change from step to step, found the same at all of them")
    return changes


def check_linear(predictor: Predictor) -> None:
    """Refuses a predictor that is no sum of latents and outputs, with the same weights for all elements: such a one does not
    commute with the cosine transform.

    Raises:
        ValueError: it is none.
    """
    drawn = torch.randn(2 * predictor.looks_back + 2, 12, generator=torch.Generator().manual_seed(0))
    shape = (1, 2, 2, 3, 1)

    def predicted(x: Tensor, before: Tensor, *computed: Tensor) -> Tensor:
        pairs = enumerate(zip(computed[::2], computed[1::2], strict=True))
        known = tuple(Computed(step, torch.tensor(9.0 - step), *pair) for step, pair in pairs)
        step = len(known)
        return predictor.predict(Now(step, step + 2, step, "", torch.tensor(8.5 - step), x, before, known))

    def turned(x: Tensor) -> Tensor:
        return cosine_transform(x, [-1], [12])

    before, after = predicted(*drawn.reshape(-1, *shape)).reshape(12), predicted(*turned(drawn).reshape(-1, *shape))
    if not torch.allclose(turned(before), after.reshape(12), rtol=1e-3, atol=1e-4):
        raise ValueError(
            f"{predictor.label}: expected a predictor that is a sum of latents and outputs, with the same weights for all their "
            "elements, found another: its schedules cannot be derived. Leave it out of `predictors`"
        )


def parts(step: TrajectoryStep) -> dict[Part, Tensor]:
    """The outputs of a step, each of the shape of the latents."""
    rows = len(step.x)
    return {(branch, number): part for branch, v in step.v.items() for number, part in enumerate(v.split(rows))}


def _samples(trajectory: Trajectory, take: Callable[[Tensor], Tensor]) -> Samples:
    steps = trajectory.steps
    return Samples(
        x=torch.stack([take(step.x) for step in steps]),
        v=tuple({part: take(v) for part, v in parts(step).items()} for step in steps),
        timesteps=torch.tensor([step.timestep for step in steps], dtype=torch.float32),
    )
