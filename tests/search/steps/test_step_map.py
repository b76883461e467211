"""What a scheduler does with an output, found from a recorded run alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

from diffusers_accel.search.steps.recorder import record
from diffusers_accel.search.steps.samples import coefficients
from diffusers_accel.search.steps.step_map import fit_steps
from diffusers_accel.search.steps.trajectory import Trajectory
from tests.search.steps.synthetic import SIGMAS, drawn, euler, wan_call, wan_prompt
from tests.tiny import TEXT_DIM, TEXT_TOKENS, tiny_cogvideox, tiny_wan


def unipc() -> Any:
    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)


def dpm() -> Any:
    return DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)


def flow_euler() -> Any:
    return FlowMatchEulerDiscreteScheduler(shift=3.0)


def test_eulers_method_is_1_and_the_step_in_sigma() -> None:
    fits = fit_steps(coefficients(euler(lambda step: {"": drawn(step + 1)}, {"": 1.0})))
    assert len(fits) == len(SIGMAS) - 2
    for fit, sigma, following in zip(fits, SIGMAS, SIGMAS[1:]):
        assert fit.x == pytest.approx((1.0,), abs=1e-6)
        assert fit.v == ({("", 0): pytest.approx(following - sigma, abs=1e-6)},)
        assert fit.residual < 5e-6  # fp32


def test_guidance_weights_fall_out_though_branches_are_nearly_alike() -> None:
    shared, guidance = drawn(99), 5.0

    def outputs(step: int) -> dict[str, torch.Tensor]:
        return {"cond": shared + 0.01 * drawn(2 * step), "uncond": shared + 0.01 * drawn(2 * step + 1)}

    fits = fit_steps(coefficients(euler(outputs, {"cond": guidance, "uncond": 1 - guidance})))
    for fit, sigma, following in zip(fits, SIGMAS, SIGMAS[1:]):
        moved = following - sigma
        assert fit.v[0]["cond", 0] == pytest.approx(moved * guidance, abs=1e-4)
        assert fit.v[0]["uncond", 0] == pytest.approx(moved * (1 - guidance), abs=1e-4)


def test_noise_that_a_sampler_adds_is_left_over_and_told() -> None:
    exact = fit_steps(coefficients(euler(lambda step: {"": drawn(step + 1)}, {"": 1.0})))
    noisy = fit_steps(
        coefficients(euler(lambda step: {"": drawn(step + 1)}, {"": 1.0}, noise=lambda step: 0.1 * drawn(50 + step)))
    )
    for one, other in zip(exact, noisy, strict=True):
        assert one.residual < 5e-6 and 0.2 < other.residual < 1


def test_outputs_that_never_change_leave_a_fit_of_small_numbers() -> None:
    v = drawn(1)
    fits = fit_steps(coefficients(euler(lambda step: {"cond": v, "uncond": v}, {"cond": 3.0, "uncond": -2.0})))
    for fit, sigma, following in zip(fits, SIGMAS, SIGMAS[1:]):
        assert fit.residual < 1e-5
        assert sum(fit.v[0].values()) == pytest.approx(following - sigma, abs=1e-5)
        assert max(map(abs, fit.v[0].values())) < 1


@pytest.mark.parametrize("scheduler", [flow_euler, unipc, dpm])
def test_real_schedulers_of_one_and_of_several_steps_are_sums(scheduler: Any) -> None:
    pipe = tiny_wan()
    pipe.scheduler = scheduler()
    trajectory = record(pipe, wan_prompt(), wan_call(guidance_scale=3.0), 0)
    fits = fit_steps(coefficients(trajectory))
    assert max(fit.residual for fit in fits) < 1e-3
    lengths = {len(fit.x) for fit in fits}
    assert lengths == {1} if scheduler is flow_euler else max(lengths) > 1, "a memory where the sampler has one"
    if scheduler is flow_euler:
        sigmas = pipe.scheduler.sigmas
        for step, fit in enumerate(fits):
            moved = float(sigmas[step + 1] - sigmas[step])
            assert fit.x[0] == pytest.approx(1, abs=1e-4)
            assert fit.v[0] == {
                ("cond", 0): pytest.approx(3 * moved, abs=1e-3),
                ("uncond", 0): pytest.approx(-2 * moved, abs=1e-3),
            }


def test_a_batch_of_guidance_is_taken_apart() -> None:
    fits = fit_steps(coefficients(cogvideox(3.0)))
    for fit in fits:
        assert fit.residual < 1e-3
        uncond, cond = fit.v[0]["cond_uncond", 0], fit.v[0]["cond_uncond", 1]
        assert cond / uncond == pytest.approx(3 / -2, rel=1e-2)


def cogvideox(guidance: float) -> Trajectory:
    generator = torch.Generator().manual_seed(0)
    prompt = {
        "prompt_embeds": torch.randn(1, TEXT_TOKENS, TEXT_DIM, generator=generator),
        "negative_prompt_embeds": torch.zeros(1, TEXT_TOKENS, TEXT_DIM),
    }
    call = {"height": 64, "width": 64, "num_frames": 5, "num_inference_steps": 5, "guidance_scale": guidance}
    return record(tiny_cogvideox(), prompt, call, 0)
