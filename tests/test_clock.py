"""The clock follows the pipeline that runs, and counts the steps that run."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    CogVideoXVideoToVideoPipeline,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
    WanPipeline,
    WanVideoToVideoPipeline,
)
from diffusers.modular_pipelines.modular_pipeline import ModularPipelineBlocks
from diffusers.modular_pipelines.modular_pipeline_utils import ComponentSpec
from diffusers.modular_pipelines.wan.modular_blocks_wan import WanCoreDenoiseStep

from diffusers_accel import patch
from diffusers_accel.api import attach
from diffusers_accel.attach.clock import Clock
from diffusers_accel.call import AttentionCall
from diffusers_accel.methods import Method, Recipe, Skip
from tests.tiny import (
    HEADS,
    TEXT_DIM,
    TEXT_TOKENS,
    tiny_cogvideox,
    tiny_cogvideox_call,
    tiny_wan,
    tiny_wan_call,
    tiny_wan_transformer,
)

QUARTER = Recipe(heads=(Method(select=Skip()),), dense_steps=0.25)
VIDEO = [np.zeros((64, 64, 3), dtype=np.uint8)] * 5


class Watch:
    """An engine that notes what the clock says at the first layer."""

    def __init__(self, seen: list[tuple[Any, str]]) -> None:
        self.seen = seen

    def attend(self, call: AttentionCall, q: Any, k: Any, v: Any) -> torch.Tensor:
        if call.layer == 0:
            self.seen.append((call.now, call.branch))
        assert call.dense is not None
        return call.dense(q, k, v)


def watched(target: Any, run: Any) -> list[tuple[Any, str]]:
    seen: list[tuple[Any, str]] = []
    with attach(target, lambda site: Watch(seen)):
        run()
    return seen


def video_to_video(pipe: WanPipeline) -> WanVideoToVideoPipeline:
    sibling = WanVideoToVideoPipeline.from_pipe(pipe)
    sibling.set_progress_bar_config(disable=True)
    return sibling


def edit(pipe: Any, strength: float = 0.5, steps: int = 8, **overrides: Any) -> None:
    """Half of the schedule, from the middle of it."""
    tokens = TEXT_TOKENS if isinstance(pipe, CogVideoXVideoToVideoPipeline) else 8
    call = {
        "video": VIDEO,
        "prompt_embeds": torch.ones(1, tokens, TEXT_DIM),
        "negative_prompt_embeds": torch.zeros(1, tokens, TEXT_DIM),
        "height": 64,
        "width": 64,
        "num_inference_steps": steps,
        "strength": strength,
        "guidance_scale": 1.0,
        "output_type": "latent",
    }
    pipe(**{**call, **overrides})


@pytest.mark.parametrize("made", ["before the patch", "after the patch"])
@pytest.mark.parametrize("patched", ["the pipeline", "the sibling", "the transformer"])
def test_shares_of_the_schedule_are_shares_of_the_steps_that_run(made: str, patched: str) -> None:
    """Whichever of the pipelines around a transformer is patched, and whichever runs."""
    pipe = tiny_wan()
    sibling = video_to_video(pipe)
    target = {"the pipeline": pipe, "the sibling": sibling, "the transformer": pipe.transformer}[patched]
    with patch(target, QUARTER) as done:
        runs = video_to_video(pipe) if made == "after the patch" else sibling
        edit(runs)
        assert done.report().rows[0]["methods"] == {"dense": HEADS, "skip": 3 * HEADS}, "4 of 8 steps run"
        done.clear()
        pipe(**tiny_wan_call(output_type="latent", num_inference_steps=8, guidance_scale=1.0))
        assert done.report().rows[0]["methods"] == {"dense": 2 * HEADS, "skip": 6 * HEADS}


def test_cogvideox_video_to_video() -> None:
    pipe = tiny_cogvideox()
    sibling = CogVideoXVideoToVideoPipeline.from_pipe(pipe)
    sibling.set_progress_bar_config(disable=True)
    assert [now for now, _ in watched(pipe, lambda: edit(sibling))] == [(i, 4) for i in range(4)]
    whole = watched(sibling, lambda: pipe(**tiny_cogvideox_call(output_type="latent", num_inference_steps=3)))
    assert [now for now, _ in whole] == [(i, 3) for i in range(3)]


def test_steps_said_by_the_pipeline_itself_are_those_that_run() -> None:
    """A Wan pipeline numbers its steps for `cache_context`; that wins over where the timestep stands."""
    pipe = tiny_wan()

    def run() -> None:
        with torch.no_grad(), pipe.transformer.cache_context("cond", step_index=1, num_inference_steps=4):
            pipe.transformer(
                hidden_states=torch.zeros(1, 4, 3, 16, 16),
                timestep=torch.tensor([500]),
                encoder_hidden_states=torch.zeros(1, 8, TEXT_DIM),
            )

    assert watched(pipe, run) == [((1, 4), "cond")]


def test_what_is_said_in_one_thread_is_not_heard_in_another() -> None:
    """Two threads that share a transformer, each inside a `cache_context` of its own: branch and step are those of the thread."""
    transformer = tiny_wan_transformer()
    said = {"cond": (0, 4), "uncond": (2, 4)}
    inside = threading.Barrier(len(said), timeout=60)

    def work(branch: str) -> None:
        step, steps = said[branch]
        with torch.no_grad(), transformer.cache_context(branch, step_index=step, num_inference_steps=steps):
            inside.wait()
            transformer(
                hidden_states=torch.zeros(1, 4, 3, 16, 16),
                timestep=torch.tensor([500]),
                encoder_hidden_states=torch.zeros(1, 8, TEXT_DIM),
            )
            inside.wait()

    def run() -> None:
        threads = [threading.Thread(target=work, args=(branch,)) for branch in said]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    assert {branch: now for now, branch in watched(transformer, run)} == said


def test_a_scheduler_of_second_order_repeats_timesteps() -> None:
    sibling = video_to_video(tiny_wan())
    sibling.scheduler = FlowMatchHeunDiscreteScheduler()
    seen = [now for now, _ in watched(sibling, lambda: edit(sibling, strength=1.0, steps=4))]
    assert seen == [(i, 7) for i in range(7)], "each step but the last is taken twice"
    half = [now for now, _ in watched(sibling, lambda: edit(sibling, strength=0.5, steps=4))]
    assert half == [(i, 3) for i in range(3)]


def test_an_interrupted_sibling_is_not_taken_for_the_one_that_runs() -> None:
    """It leaves its last timestep standing; its scheduler is its own here, so the timestep still looks valid."""
    pipe = tiny_wan()
    sibling = video_to_video(pipe)
    sibling.scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)

    def stop(pipe: Any, step: int, *_: Any) -> Any:
        raise KeyboardInterrupt

    other = video_to_video(pipe)

    def run() -> None:
        with pytest.raises(KeyboardInterrupt):
            edit(sibling, callback_on_step_end=stop)
        edit(other)

    assert [now for now, _ in watched(sibling, run)] == [(0, 4), *((i, 4) for i in range(4))]


def test_a_modular_pipeline_is_followed_by_its_guider() -> None:
    pipe = modular()
    seen = watched(pipe, lambda: run_modular(pipe, 4))
    assert seen == [((i, 4), f"guided {branch}") for i in range(4) for branch in (1, 2)]
    with patch(pipe, QUARTER) as done:
        run_modular(pipe, 8)
        assert done.report().rows[0]["methods"] == {"dense": 4 * HEADS, "skip": 12 * HEADS}


def test_a_cache_is_used_under_a_modular_pipeline() -> None:
    """Its passes are told apart by the guider: text embeddings may be converted anew at each step."""
    pipe = modular()
    with patch(pipe, "cached", refresh_every=2) as done:
        run_modular(pipe, 4)
    assert done.report().rows[0]["reused"] == 2 * 2 * HEADS


def test_a_modular_sibling_is_followed() -> None:
    pipe = tiny_wan()
    other = modular(pipe.transformer)
    assert [now for now, _ in watched(pipe, lambda: run_modular(other, 2))] == [(0, 2)] * 2 + [(1, 2)] * 2


class OwnLoop(ModularPipelineBlocks):
    """Somebody's own block, in which nothing says which step runs."""

    @property
    def expected_components(self) -> list[ComponentSpec]:
        return [ComponentSpec("transformer"), ComponentSpec("scheduler")]

    def __call__(self, components: Any, state: Any) -> Any:
        return components, state


def test_a_modular_pipeline_that_does_not_tell_its_step_is_refused_at_patch() -> None:
    pipe = OwnLoop().init_pipeline()
    pipe.update_components(transformer=tiny_wan_transformer(), scheduler=UniPCMultistepScheduler())
    with pytest.raises(ValueError, match=r"no guider.*patch\(pipe\.transformer.*Patch\.step"):
        patch(pipe, QUARTER)
    assert not pipe.transformer._forward_pre_hooks


def modular(transformer: Any = None) -> Any:
    pipe = WanCoreDenoiseStep().init_pipeline()
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    pipe.update_components(transformer=transformer or tiny_wan_transformer(), scheduler=scheduler)
    return pipe


def run_modular(pipe: Any, steps: int) -> None:
    pipe(
        prompt_embeds=torch.ones(1, 8, TEXT_DIM),
        negative_prompt_embeds=torch.zeros(1, 8, TEXT_DIM),
        latents=torch.ones(1, 4, 3, 32, 32),
        height=256,
        width=256,
        num_frames=9,
        num_inference_steps=steps,
    )


class Loop:
    """A pipeline that sets no `_current_timestep`; a part of its scheduler's timesteps runs, or of a copy of these."""

    def __init__(self, part: slice, own: bool = False) -> None:
        self.transformer = tiny_wan_transformer()
        self.scheduler = UniPCMultistepScheduler()
        self.scheduler.set_timesteps(8)
        self.part, self.own = part, own

    def __call__(self) -> None:
        timesteps = self.scheduler.timesteps[self.part]
        if self.own:
            timesteps = timesteps.clone()
        for t in timesteps:
            x, text = torch.zeros(1, 4, 3, 8, 8), torch.zeros(1, 8, TEXT_DIM)
            self.transformer(hidden_states=x, timestep=t[None].float(), encoder_hidden_states=text)


@pytest.mark.parametrize("own", [False, True], ids=["the scheduler's timesteps", "its own"])
@pytest.mark.parametrize("part", [slice(None), slice(5, None)], ids=["all", "the last 3"])
def test_a_pipeline_that_keeps_its_timestep_to_itself_is_followed_by_its_loop(part: slice, own: bool) -> None:
    pipe = Loop(part, own)
    steps = len(pipe.scheduler.timesteps[part])
    with torch.no_grad():
        assert [now for now, _ in watched(pipe, pipe)] == [(step, steps) for step in range(steps)]


def in_a_thread(work: Callable[[], Any]) -> Any:
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(work()))
    thread.start()
    thread.join(timeout=60)
    return found[0]


def test_each_thread_with_a_loop_of_its_own_has_its_own_step() -> None:
    """Two loops over one patched transformer; one that has said nothing goes by what was said last."""
    clock = Clock()
    clock.set(1, 4, sigma=0.75)

    def other() -> tuple[Any, Any, Any]:
        before = clock.now(), clock.sigma()
        clock.set(7, 9)
        return *before, clock.now()

    assert in_a_thread(other) == ((1, 4), 0.75, (7, 9))
    assert (clock.now(), clock.sigma()) == ((1, 4), 0.75)
    assert in_a_thread(clock.now) == (7, 9)


def test_noise_levels_of_another_threads_scheduler_are_not_taken_for_ones_own() -> None:
    """It reads its own between our reading and our answer."""
    own, others = torch.tensor([1.0, 0.5, 0.0]), torch.tensor([0.9, 0.1])

    class Interrupted(Clock):
        def __setattr__(self, name: str, value: Any) -> None:
            super().__setattr__(name, value)
            if name == "_levels" and value is not None and value[0]() is own:
                in_a_thread(lambda: self._flow_levels(others))

    clock = Interrupted()
    assert clock._flow_levels(own) == (1.0, 0.5, 0.0)
    assert clock._levels is not None and clock._levels[0]() is others, "it did"
