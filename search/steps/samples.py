"""The elements of a trajectory on which errors are worked out: some of them, drawn once, in fp32."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusers_accel.files import quoted
from diffusers_accel.forwards import Computed, Now, Predictor
from diffusers_accel.search.steps.trajectory import Trajectory, TrajectoryStep

ELEMENTS = 1 << 16  # of the latents: a mean square of so many is known to about 1 %
Part = tuple[str, int]  # a branch of guidance, and which of the parts of its batch


@dataclass(frozen=True, eq=False)
class Samples:
    """Elements of the latents and outputs of every step, whose batch of guidance is taken apart.

    Args:
        x: [steps, ...] fp32.
        v: of each step, by part, in the order in which they ran: [...] fp32.
        timesteps: [steps] fp32.
        energy: mean square of the final latents; of the last recorded ones where these are unknown.
    """

    x: Tensor
    v: tuple[Mapping[Part, Tensor], ...]
    timesteps: Tensor
    energy: float

    @property
    def steps(self) -> int:
        return len(self.x)


def sampled(trajectory: Trajectory) -> Samples:
    """At most `ELEMENTS` elements, drawn from those that are denoised. The same for one shape."""
    free = denoised(trajectory).reshape(-1).nonzero().reshape(-1)
    if len(free) > ELEMENTS:
        draw = torch.randperm(len(free), generator=torch.Generator().manual_seed(0))[:ELEMENTS]
        free = free[draw.sort().values]
    return _samples(trajectory, lambda x: x.reshape(-1)[free].float())


def whole(trajectory: Trajectory) -> Samples:
    """All elements, in their shape: for what looks at how they lie."""
    return _samples(trajectory, lambda x: x.float())


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


def check_elementwise(predictor: Predictor) -> None:
    """Refuses a predictor that mixes elements: errors are taken of some elements, each by itself.

    Raises:
        ValueError: it mixes them.
    """
    drawn = torch.randn(2 * predictor.looks_back + 2, 1, 2, 2, 2, 2, generator=torch.Generator().manual_seed(0))

    def predicted(x: Tensor, before: Tensor, *computed: Tensor) -> Tensor:
        pairs = enumerate(zip(computed[::2], computed[1::2], strict=True))
        known = tuple(Computed(step, torch.tensor(9.0 - step), *pair) for step, pair in pairs)
        step = len(known)
        return predictor.predict(Now(step, step + 2, step, "", torch.tensor(8.5 - step), x, before, known))

    together, alone = predicted(*drawn), predicted(*drawn.flatten(1)[:, 3:5])
    if not torch.allclose(alone, together.flatten()[3:5], rtol=1e-4, atol=1e-5):
        raise ValueError(
            f"{predictor.label}: expected a predictor that treats each element of the latents by itself, found one that mixes "
            "them: its schedules cannot be derived from a sample of elements. Leave it out of `predictors`"
        )


def _samples(trajectory: Trajectory, take: Callable[[Tensor], Tensor]) -> Samples:
    steps, final = trajectory.steps, trajectory.final
    shape = steps[0].x.shape
    if final is None:
        ends = take(steps[-1].x)
    else:
        ends = take(final) if final.shape == shape else final
    energy = float(ends.double().square().mean())
    if not energy:
        raise ValueError(f"{quoted(trajectory.prompt)}: expected final latents that are not all 0, found none")
    return Samples(
        x=torch.stack([take(step.x) for step in steps]),
        v=tuple({part: take(v) for part, v in parts(step).items()} for step in steps),
        timesteps=torch.tensor([step.timestep for step in steps], dtype=torch.float32),
        energy=energy,
    )


def parts(step: TrajectoryStep) -> dict[Part, Tensor]:
    """The outputs of a step, each of the shape of the latents."""
    rows = len(step.x)
    return {(branch, number): part for branch, v in step.v.items() for number, part in enumerate(v.split(rows))}
