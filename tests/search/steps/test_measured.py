"""What choices of steps do when the model runs with them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from diffusers_accel import patch
from diffusers_accel.forwards import Forwards, Last, Schedule
from diffusers_accel.search.last_latents import LastLatents
from diffusers_accel.search.sensitivity import drift
from diffusers_accel.search.steps.measured import MeasuredSteps
from diffusers_accel.support.seeded import seeded
from tests.search.steps.synthetic import wan_call, wan_prompt
from tests.tiny import tiny_wan


def scheduled(*computed: int) -> Forwards:
    return Forwards(Schedule(steps=computed), Last("velocity"))


def finished(pipe: Any, seed: int, forwards: Forwards | None) -> Tensor:
    """The latents at the end of a generation that is run as a user does."""
    last = LastLatents()
    with seeded(seed, torch.device("cpu")) as generator:
        patched = patch(pipe, forwards) if forwards is not None else None
        pipe(**wan_call(), **wan_prompt(), generator=generator, callback_on_step_end=last)
        if patched is not None:
            patched.unpatch()
    return last.ending.latents


def test_the_error_is_the_geometric_mean_over_the_prompts() -> None:
    pipe, forwards = tiny_wan(), scheduled(0, 3, 5, 7)
    errors = [drift(finished(pipe, seed, forwards), finished(pipe, seed, None)) for seed in (3, 4)]
    assert abs(errors[0] / errors[1] - 1) > 0.05
    found = MeasuredSteps(pipe, [wan_prompt(), wan_prompt()], wan_call(), 3)
    assert found.error(forwards) == pytest.approx((errors[0] * errors[1]) ** 0.5)
    assert found.error(scheduled(*range(8))) == 0


def test_the_dense_clips_are_made_once_and_no_decoder_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, forwards = tiny_wan(), 0

    def count(module: Any, args: Any, output: Any) -> None:
        nonlocal forwards
        forwards += 1

    pipe.transformer.blocks[0].register_forward_hook(count)
    found = MeasuredSteps(pipe, [wan_prompt()], wan_call(), 0)
    found.error(scheduled(0, 4, 7))
    monkeypatch.setattr(pipe.vae, "decode", None)  # the number of steps is known by now
    found.error(scheduled(0, 7))
    branches = 1 if wan_call()["guidance_scale"] == 1 else 2
    assert forwards == branches * (8 + 3 + 2)


def test_a_generation_that_fails_leaves_the_pipeline_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tiny_wan()
    before = [module.processor for module in pipe.transformer.modules() if hasattr(module, "processor")]
    found = MeasuredSteps(pipe, [wan_prompt()], wan_call(), 0)
    found.error(scheduled(0, 7))
    monkeypatch.setattr(pipe.scheduler, "step", None)
    with pytest.raises(TypeError):
        found.error(scheduled(0, 4, 7))
    assert [module.processor for module in pipe.transformer.modules() if hasattr(module, "processor")] == before
    assert "forward" not in vars(pipe.transformer)
