"""A dense generation as it is recorded: what goes into the transformers of real pipelines, and what comes out."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from diffusers_accel import patch
from diffusers_accel.search.last_latents import LastLatents
from diffusers_accel.search.running import run_pipeline
from diffusers_accel.search.sensitivity import Dense
from diffusers_accel.search.steps import samples
from diffusers_accel.search.steps.recorder import TrajectoryRecorder, record
from diffusers_accel.search.steps.samples import MOST, coefficients, denoised, parts
from diffusers_accel.search.steps.trajectory import Trajectory
from tests.families import TINY
from tests.search.steps.synthetic import wan_call, wan_prompt
from tests.search.steps.test_step_map import cogvideox
from tests.tiny import tiny_wan

OURS = ("generator", "output_type")


def recorded(name: str, pipe: Any = None, **overrides: Any) -> tuple[Any, Trajectory]:
    """The trajectory of a tiny family's own call."""
    tiny = TINY[name]
    pipe = tiny.pipe() if pipe is None else pipe
    call = {key: value for key, value in tiny.call(**overrides).items() if key not in OURS}
    prompt = {key: call.pop(key) for key in list(call) if "prompt" in key}
    return pipe, record(pipe, prompt, call, 0)


def seen(pipe: Any) -> list[tuple[Tensor, Tensor]]:
    """(latents, output) of every forward of a Wan pipeline from now on."""
    found: list[tuple[Tensor, Tensor]] = []

    def note(module: Any, args: Any, given: dict[str, Any], output: Any) -> None:
        found.append((given["hidden_states"].clone(), output[0].clone()))

    for module in (pipe.transformer, pipe.transformer_2):
        if module is not None:
            module.register_forward_hook(note, with_kwargs=True)
    return found


@pytest.mark.parametrize("experts", [1, 2])
def test_inputs_and_outputs_are_those_of_the_model(experts: int) -> None:
    pipe = tiny_wan(experts)
    calls = seen(pipe)
    found = record(pipe, wan_prompt(), wan_call(guidance_scale=3.0), 0)
    assert len(found.steps) == 8 and len(calls) == 16
    for number, step in enumerate(found.steps):
        assert list(step.v) == ["cond", "uncond"]
        for (x, v), mine in zip(calls[2 * number : 2 * number + 2], step.v.values(), strict=True):
            assert torch.equal(x, step.x) and torch.equal(v, mine)
        assert step.timestep == float(pipe.scheduler.timesteps[number])
    names = {1: {"transformer"}, 2: {"transformer", "transformer_2"}}[experts]
    assert set(found.transformers) == names
    assert found.fresh == ((0,) if experts == 1 else (0, found.transformers.index("transformer_2")))
    latents = found.steps[0].x.numel() * 4
    assert found.bytes == 8 * 3 * latents + latents


def test_recording_changes_nothing_and_leaves_nothing() -> None:
    pipe = tiny_wan()

    def final() -> Tensor:
        generator = torch.Generator().manual_seed(0)
        frames: Tensor = pipe(**wan_prompt(), **wan_call(), generator=generator, output_type="latent").frames
        return frames

    stock = final()  # after which diffusers' own hooks are in their place
    before = dict(vars(pipe.transformer)), len(pipe.transformer._forward_hooks)
    assert torch.equal(record(pipe, wan_prompt(), wan_call(), 0).final, stock)
    assert torch.equal(final(), stock)
    assert vars(pipe.transformer).keys() == before[0].keys() and len(pipe.transformer._forward_hooks) == before[1]


def test_the_run_of_another_engine_can_be_recorded() -> None:
    """As the probe's own first generation."""
    pipe = tiny_wan()
    alone = record(pipe, wan_prompt(), wan_call(), 0)
    recorder, last = TrajectoryRecorder("", {}), LastLatents()
    assert run_pipeline(pipe, lambda site: Dense(), wan_prompt(), wan_call(), 0, last, recorder.around)
    beside = recorder.trajectory(last.ending.latents)
    assert len(beside.steps) == len(alone.steps)
    for one, other in zip(beside.steps, alone.steps, strict=True):
        assert torch.allclose(one.x, other.x, atol=1e-5) and torch.allclose(one.v["cond"], other.v["cond"], atol=1e-4)


def test_batched_guidance_has_its_latents_once() -> None:
    found = cogvideox(3.0)
    for step in found.steps:
        (branch,) = step.v
        assert len(step.x) == 1 and len(step.v[branch]) == 2
        assert list(parts(step)) == [(branch, 0), (branch, 1)]
        assert not torch.equal(*step.v[branch])


@pytest.mark.parametrize("name", ["ltx2", "hunyuan_video", "mochi", "latte", "allegro", "wan_vace", "cosmos, 2.5"])
def test_other_families(name: str) -> None:
    """Video and audio, of which the video is kept; channels last; batches; outputs with a variance."""
    _, found = recorded(name)
    branches = TINY[name].branches
    assert [list(step.v) for step in found.steps] == [[*branches]] * len(found.steps) or "branch 0" in found.steps[0].v
    assert len(found.steps) == 5 and found.fresh == (0,)
    assert found.final is not None and torch.isfinite(coefficients(found).x).all()


def test_frames_that_are_given_are_not_counted() -> None:
    """The first frame of an image that is animated stays as it is."""
    _, found = recorded("wan, first frame")
    free = denoised(found)
    assert not free[:, :, 0].any() and free[:, :, 1:].float().mean() > 0.99
    held = replace(found, steps=tuple(replace(step, x=step.x + ~free) for step in found.steps))
    assert torch.equal(coefficients(held).x, coefficients(found).x)


def test_of_large_latents_the_coarse_part_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    _, found = recorded("wan")
    every = coefficients(found).x
    assert every.shape[1:] == found.steps[0].x.shape and every.numel() // len(every) <= MOST
    assert torch.allclose(every.square().sum(), sum(step.x.square().sum() for step in found.steps), rtol=1e-4)
    monkeypatch.setattr(samples, "MOST", 1000)
    few = coefficients(found).x
    assert 200 < few[0].numel() <= 1000
    assert torch.allclose(few, every[tuple(slice(size) for size in few.shape)], atol=1e-5)


def test_models_that_go_from_chunk_to_chunk_are_refused_before_they_run() -> None:
    tiny = TINY["framepack"]
    pipe = tiny.pipe()
    call = {key: value for key, value in tiny.call().items() if key not in OURS}
    with pytest.raises(ValueError, match="chunk by chunk"):
        record(pipe, {"prompt_embeds": call.pop("prompt_embeds")}, call, 0)
    with patch(pipe, "easycache", threshold=0):
        pass  # it is left as it was


def test_what_is_no_whole_generation_is_refused() -> None:
    recorder = TrajectoryRecorder("", {})
    x = torch.ones(1, 4)
    with pytest.raises(RuntimeError, match="expected a whole generation, found 0"):
        recorder.trajectory(None)
    recorder.add("transformer", "cond", (0, 3), torch.tensor(9.0), x, x)
    with pytest.raises(RuntimeError, match="found step 0 of 3 on the branch 'cond' after 1 steps of 3"):
        recorder.add("transformer", "cond", (0, 3), torch.tensor(9.0), x, x)
    with pytest.raises(RuntimeError, match="the same latents"):
        recorder.add("transformer", "uncond", (0, 3), torch.tensor(9.0), x + 1, x)
    with pytest.raises(RuntimeError, match="found step 2 of 3"):
        recorder.add("transformer", "cond", (2, 3), torch.tensor(9.0), x, x)
    with pytest.raises(RuntimeError, match="found 1 of 3 steps"):
        recorder.trajectory(None)
