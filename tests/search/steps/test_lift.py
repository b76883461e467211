"""What a deviation becomes by the end of a run."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from diffusers_accel.search.steps.lift import Lift, lifts_of
from diffusers_accel.search.steps.samples import coefficients, coefficients_of
from diffusers_accel.search.steps.spectrum import cosine_transform
from diffusers_accel.search.steps.trajectory import Trajectory, TrajectoryStep
from tests.search.steps.synthetic import drawn

SHAPE, STEPS = (1, 6, 8, 12, 12), 100
AXES = (2, 3, 4)
SIGMAS = [1 - step / STEPS for step in range(STEPS + 1)]


def scales() -> Tensor:
    """Of normally distributed latents at each frequency: coarse ones are strong."""
    grids = torch.meshgrid(*(torch.arange(SHAPE[axis]) / SHAPE[axis] for axis in AXES), indexing="ij")
    return 4 * torch.exp(-4 * (sum(grid.square() for grid in grids) / 3).sqrt())  # type: ignore[union-attr]


def velocity(x: Tensor, sigma: float) -> Tensor:
    """Of the flow of these latents, in coefficients: what a perfect model gives."""
    alpha, power = 1 - sigma, scales().square()
    content = alpha * power / (alpha**2 * power + sigma**2) * x
    return (x - content) / sigma


def flow(x: Tensor, first: int = 0) -> list[Tensor]:
    """The latents of all steps from `first` on, by Heun's method."""
    found = [x]
    for sigma, following in zip(SIGMAS[first:], SIGMAS[first + 1 :]):
        v = velocity(x, sigma)
        ahead = x + (following - sigma) * v
        x = x + (following - sigma) * (v + velocity(ahead, following)) / 2 if following > 1e-9 else ahead
        found.append(x)
    return found


def as_latents(x: Tensor) -> Tensor:
    """The transform turned back: it is orthonormal."""
    for axis in AXES:
        eye = cosine_transform(torch.eye(x.shape[axis]), [1], [x.shape[axis]])  # rows: places
        x = torch.tensordot(x, eye, dims=([axis], [1])).movedim(-1, axis)
    return x


@pytest.fixture(scope="module")
def recorded() -> tuple[Trajectory, Lift, Callable[[Tensor], Tensor]]:
    course = flow(drawn(0, SHAPE))
    steps = [
        TrajectoryStep("transformer", 1000 * sigma, as_latents(x), {"": as_latents(velocity(x, sigma))})
        for x, sigma in zip(course[:-1], SIGMAS)
    ]
    trajectory = Trajectory("", tuple(steps), as_latents(course[-1]))
    return trajectory, lifts_of([trajectory], [coefficients(trajectory)])[0], coefficients_of(trajectory)


def test_what_is_built_is_what_is_recorded(recorded: tuple[Trajectory, Lift, Callable[[Tensor], Tensor]]) -> None:
    trajectory, _, take = recorded
    assert trajectory.final is not None
    assert torch.allclose(take(trajectory.final), flow(drawn(0, SHAPE))[-1], atol=1e-3)


@pytest.mark.parametrize("step", [10, 40, 70, 95])
def test_a_deviation_grows_or_shrinks_as_in_a_flow(
    recorded: tuple[Trajectory, Lift, Callable[[Tensor], Tensor]], step: int
) -> None:
    """Of normally distributed latents, whose model is known: run on from deviating latents, coarse or fine, and compare. The
    formula is exact; with powers and levels from one recorded run it is within a factor of 1.5."""
    _, lift, _ = recorded
    exact = Lift(
        scales().square(), tuple(1 - sigma for sigma in SIGMAS), tuple(sigma**2 for sigma in SIGMAS), lift.energy
    )
    before = flow(drawn(0, SHAPE))[step]
    for name, strength in (("coarse", scales()), ("fine", 1 / scales()), ("all", torch.ones(SHAPE[2:]))):
        deviation = drawn(7, SHAPE) * strength
        found = (flow(before + deviation, step)[-1] - flow(before, step)[-1]) / lift.energy**0.5
        assert float((exact(step, deviation) - found).norm() / found.norm()) < 0.03, name
        assert 1 / 1.5 < float(lift(step, deviation).norm() / found.norm()) < 1.5, name


def test_an_early_error_of_the_coarse_part_counts_more(
    recorded: tuple[Trajectory, Lift, Callable[[Tensor], Tensor]],
) -> None:
    _, lift, _ = recorded
    assert 4 < lift.gain(20)[0, 0, 0, 0, 0] < 6, "1 / 0.2"
    assert lift.gain(20)[0, 0, -1, -1, -1] < 0.2
    assert lift.gain(99)[0, 0, 0, 0, 0] == pytest.approx(1, abs=0.05)


def test_without_final_latents_the_last_ones_stand_for_them() -> None:
    one = TrajectoryStep("transformer", 1.0, drawn(0), {"": drawn(1)})
    trajectory = Trajectory("", (one, TrajectoryStep("transformer", 0.5, drawn(2), {"": drawn(1)})))
    (lift,) = lifts_of([trajectory], [coefficients(trajectory)])
    assert lift.energy == pytest.approx(float(drawn(2).square().sum()), rel=1e-4)
    assert torch.allclose(lift.gain(1), torch.ones(()), atol=1e-3)
    zero = Trajectory("a prompt", trajectory.steps, torch.zeros_like(drawn(0)))
    with pytest.raises(ValueError, match="'a prompt': expected final latents that are not all 0"):
        lifts_of([zero], [coefficients(zero)])
