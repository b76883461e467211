"""Errors of runs of predicted steps: closed forms, and what a patched pipeline really does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from diffusers_accel import patch
from diffusers_accel.forwards import Forwards, Last, Predictor, Schedule, Taylor
from diffusers_accel.search.steps.course import Course, Follower
from diffusers_accel.search.steps.lift import Lift
from diffusers_accel.search.steps.recorder import record
from diffusers_accel.search.steps.run_errors import path_error, run_errors, sketch
from diffusers_accel.search.steps.samples import check_linear, coefficients, coefficients_of
from diffusers_accel.search.steps.state_graph import state_graph
from diffusers_accel.search.steps.step_map import fit_steps
from diffusers_accel.search.steps.trajectory import Trajectory
from tests.search.steps.synthetic import SHAPE, SIGMAS, drawn, euler, wan_call, wan_prompt, wave_pipeline
from tests.search.steps.test_step_map import flow_euler, unipc

STEPS = len(SIGMAS) - 1
VELOCITY, RESIDUAL, LINEAR = Last("velocity"), Last("residual"), Taylor(1)


def follower(trajectory: Trajectory, predictor: Predictor) -> Follower:
    samples = coefficients(trajectory)
    return Follower(samples, fit_steps(samples), predictor, predictor.looks_back, trajectory.fresh)


def flat(trajectory: Trajectory) -> Lift:
    """The lift of a model that leaves every deviation as it is."""
    steps = len(trajectory.steps)
    return Lift(torch.ones(SHAPE), (1.0,) * steps, (0.0,) * steps, final_energy(trajectory))


def errors(trajectory: Trajectory, predictor: Predictor) -> dict[tuple[int, ...], dict[int, float]]:
    graph = state_graph(len(trajectory.steps), trajectory.fresh, predictor)
    found = run_errors(follower(trajectory, predictor), flat(trajectory), graph)
    return {state: {end: float(each.square().sum()) for end, each in row.items()} for state, row in found.items()}


def final_energy(trajectory: Trajectory) -> float:
    assert trajectory.final is not None
    return float(trajectory.final.square().sum())


def test_an_output_that_never_changes_costs_nothing_to_keep() -> None:
    found = errors(euler(lambda step: {"": drawn(1)}, {"": 1.0}), VELOCITY)
    assert set(found) == {(step,) for step in range(STEPS)}
    assert max(error for row in found.values() for error in row.values()) < 1e-10


def test_an_output_that_is_linear_in_sigma_costs_nothing_to_continue() -> None:
    def outputs(step: int) -> dict[str, Tensor]:
        return {"": drawn(1) + SIGMAS[step] * drawn(2)}

    trajectory = euler(outputs, {"": 1.0})
    found = errors(trajectory, LINEAR)
    assert max(error for state, row in found.items() if len(state) == 2 for error in row.values()) < 1e-10
    assert max(found[(0,)].values()) > 1e-3, "with one computed step there is no line"
    kept, energy = errors(trajectory, VELOCITY), final_energy(trajectory)
    for (start,), row in kept.items():
        for end, error in row.items():
            # Each predicted step moves on by the output at `start`, whose sigma was another one.
            moved = sum(
                (SIGMAS[step + 1] - SIGMAS[step]) * (SIGMAS[start] - SIGMAS[step]) for step in range(start + 1, end)
            )
            expected = moved**2 * float(drawn(2).square().sum()) / energy
            assert error == pytest.approx(expected, rel=1e-3, abs=1e-10)


def test_branches_are_weighted_as_guidance_does() -> None:
    """An error of the unconditional branch counts by its own weight, and adds to that of the other with its sign."""

    def outputs(step: int) -> dict[str, Tensor]:
        return {"cond": drawn(1) + step * drawn(2), "uncond": drawn(3) + 2 * step * drawn(2)}

    trajectory = euler(outputs, {"cond": 3.0, "uncond": -2.0})
    found = errors(trajectory, VELOCITY)[(2,)][4]
    size = (SIGMAS[4] - SIGMAS[3]) * (3.0 * 1 - 2.0 * 2)
    assert found == pytest.approx(size**2 * float(drawn(2).square().sum()) / final_energy(trajectory), rel=1e-3)


def test_a_run_ends_where_an_expert_begins() -> None:
    names = ["transformer"] * 3 + ["transformer_2"] * 4
    trajectory = euler(lambda step: {"": drawn(step)}, {"": 1.0}, transformers=names)
    found = errors(trajectory, LINEAR)
    assert max(found[(0,)]) == 3 and max(found[(0, 1)]) == 3
    assert (3,) in found and not any(len(state) == 2 and state[0] < 3 <= state[1] for state in found)


def test_a_long_look_back_is_refused_in_a_long_schedule() -> None:
    assert state_graph(10, (0,), Taylor(2)).states()
    with pytest.raises(
        ValueError, match=r"taylor 3 velocity: it looks back at 4 computed steps, of which a schedule of 50 steps"
    ):
        state_graph(50, (0,), Taylor(3))


@pytest.mark.parametrize("predictor", [VELOCITY, RESIDUAL, LINEAR, Taylor(2)], ids=lambda each: each.label)
@pytest.mark.parametrize("scheduler", [flow_euler, unipc])
@pytest.mark.parametrize("computed", [(0, 1, 4, 7), (0, 3, 6, 7), (0, 7)])
def test_a_followed_run_is_what_a_patched_pipeline_does(
    scheduler: Any, predictor: Predictor, computed: tuple[int, ...]
) -> None:
    """Where the model's output does not depend on the latents, nothing is left out: the latents before the last step deviate as
    much as is foretold, whatever the scheduler remembers."""
    pipe = wave_pipeline(scheduler())
    trajectory = record(pipe, wan_prompt(), wan_call(), 0)
    with patch(pipe, Forwards(Schedule(steps=computed), predictor)):
        found = latents_before_the_last(pipe)
    one = follower(trajectory, predictor)
    course = Course(0)
    while course.step < len(trajectory.steps) - 1:
        course = one.compute(course) if course.step in computed else one.predict(course)
    expected = coefficients_of(trajectory)(found - trajectory.steps[-1].x)
    assert float(expected.norm()) > 0.1
    assert float((one.deviation(course) - expected).norm() / expected.norm()) < 1e-2


@pytest.mark.parametrize("predictor", [VELOCITY, LINEAR, Taylor(2)], ids=lambda each: each.label)
def test_a_path_is_the_sum_of_its_runs(predictor: Predictor) -> None:
    """By Euler's method, without an answer of the model, it is the whole run too: errors point where they point."""
    trajectory = euler(lambda step: {"": drawn(step) + drawn(50)}, {"": 1.0})
    computed = (0, 2, 3, 6)
    one, course = follower(trajectory, predictor), Course(0)
    while course.step < STEPS - 1:
        course = one.compute(course) if course.step in computed else one.predict(course)
    expected = float(one.deviation(course).square().sum()) / final_energy(trajectory)
    assert path_error(one, flat(trajectory), computed) == pytest.approx(expected, rel=1e-3)
    assert path_error(one, flat(trajectory), tuple(range(STEPS))) == 0


def test_a_sketch_keeps_lengths_and_angles() -> None:
    x, y = drawn(0, (1, 50_000)), drawn(1, (1, 50_000))
    y = y + x
    for a, b in ((x, x), (x, y), (y, y)):
        assert float(sketch(a) @ sketch(b)) == pytest.approx(float((a * b).sum()), rel=0.15)
    both = sketch(x, 0, 2) + sketch(y, 1, 2)
    assert float(both @ both) == pytest.approx(float(x.square().sum() + y.square().sum()), rel=0.1)
    assert torch.equal(sketch(x[:, :100], 1, 3), torch.cat([torch.zeros(100), x[0, :100], torch.zeros(100)]))


def latents_before_the_last(pipe: Any) -> Tensor:
    found: list[Tensor] = []

    def note(pipe: Any, step: int, timestep: Any, given: dict[str, Tensor]) -> dict[str, Tensor]:
        found.append(given["latents"].clone())
        return {}

    generator = torch.Generator().manual_seed(0)
    pipe(**wan_prompt(), **wan_call(), generator=generator, output_type="latent", callback_on_step_end=note)
    return found[-2]


def test_predictors_that_are_no_sums_are_refused() -> None:
    class Clamped:
        label, looks_back = "clamped", 1

        def predict(self, now: Any) -> Tensor:
            v: Tensor = now.last.v.clamp(-0.5, 0.5)
            return v

    for predictor in (VELOCITY, RESIDUAL, LINEAR, Taylor(3)):
        check_linear(predictor)
    with pytest.raises(ValueError, match="clamped: expected a predictor that is a sum of latents and outputs"):
        check_linear(Clamped())  # type: ignore[arg-type]
