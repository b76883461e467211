"""What a deviation of latents in the middle of a run becomes by its end, as far as the recorded run tells.

A model takes what it sees for content where content is expected, and for noise where it is not. If latents were normally
distributed, with a power P_f(k) at each frequency k of the finished ones and a x_f + noise of power b^2 at a step, then a sampler
that follows the flow would change a deviation at frequency k by

    gain(k) = sqrt(P_f(k) / (a^2 P_f(k) + b^2))

that is 1 / a for what is coarse (in the first steps a is small: a small error there is a large one of the content), and nearly 0
for what is drowned in noise. All of it is found in the recorded run: P_f is the power of its final latents, a comes from a fit of
the latents of a step by the final and the first ones, and b from what a x_f leaves. No scheduler is asked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusers_accel.files import quoted
from diffusers_accel.search.steps.samples import Samples, coefficients_of
from diffusers_accel.search.steps.spectrum import smoothed
from diffusers_accel.search.steps.trajectory import Trajectory


@dataclass(frozen=True, eq=False)
class Lift:
    """From deviations of the cosine coefficients at a step to the relative error of the final latents.

    Args:
        power: of the final latents at each coefficient, smoothed.
        signal, noise: a and b^2 of each step.
        energy: sum of squares of the final latents.
    """

    power: Tensor
    signal: tuple[float, ...]
    noise: tuple[float, ...]
    energy: float

    def gain(self, step: int) -> Tensor:
        """Of each coefficient, 0 or more."""
        there = self.signal[step] ** 2 * self.power + self.noise[step]
        return torch.where(there > 0, self.power / there, torch.zeros_like(there)).sqrt()

    def __call__(self, step: int, deviation: Tensor) -> Tensor:
        """The deviation of the final latents in units of their length: its sum of squares is a relative error."""
        return self.gain(step) * deviation / self.energy**0.5


def lifts_of(trajectories: Sequence[Trajectory], samples: Sequence[Samples]) -> list[Lift]:
    """Of recorded runs of one model, which share the mean power of their final latents: what is weak in one prompt may be strong
    in the next. Without final latents, those of the last step stand for them.

    Raises:
        ValueError: the final latents of a run are 0.
    """
    finals = [_final(*pair) for pair in zip(trajectories, samples, strict=True)]
    first = trajectories[0]
    sizes = [first.steps[0].x.shape[axis] for axis in first.axes]
    squares = sum((final.square() for final in finals), torch.zeros_like(finals[0])) / len(finals)
    power = smoothed(squares, first.channels, first.axes, sizes)
    found = []
    for each, final in zip(samples, finals, strict=True):
        signal = tuple(_signal(x, final, each.x[0]) for x in each.x)
        noise = tuple(float((x - a * final).double().square().mean()) for x, a in zip(each.x, signal, strict=True))
        found.append(Lift(power, signal, noise, float(final.double().square().sum())))
    return found


def _final(trajectory: Trajectory, samples: Samples) -> Tensor:
    last = trajectory.steps[-1].x
    shown = trajectory.final if trajectory.final is not None and trajectory.final.shape == last.shape else last
    final = coefficients_of(trajectory)(shown)
    if not final.any():
        raise ValueError(f"{quoted(trajectory.prompt)}: expected final latents that are not all 0, found none")
    return final


def _signal(x: Tensor, final: Tensor, start: Tensor) -> float:
    """How much of the final latents is in those of a step, beside the noise that the run began with: least squares."""
    columns = torch.stack([final.double().flatten(), start.double().flatten()])
    return float(torch.linalg.lstsq(columns @ columns.T, columns @ x.double().flatten()[:, None]).solution[0])
