"""Ways to call a family's pipelines in which steps, sizes or segments go another way than in its first tiny pipeline."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    HeliosPyramidPipeline,
    HeliosScheduler,
    SkyReelsV2DiffusionForcingImageToVideoPipeline,
    SkyReelsV2DiffusionForcingVideoToVideoPipeline,
)

from diffusers_accel import patch
from diffusers_accel.api import attach
from diffusers_accel.call import AttentionCall
from diffusers_accel.forwards.named import schedule
from tests.families.anyflow import tiny_anyflow
from tests.families.anyflow_far import far_call, tiny_far
from tests.families.chronoedit import tiny_chronoedit
from tests.families.helios import helios_call, tiny_helios
from tests.families.skyreels_v2 import forcing_call, parts, tiny_forcing
from tests.families.wan import WITHOUT_TEXT, image_call, picture, quiet
from tests.families.wan_animate import animate_call, tiny_animate
from tests.tiny import tiny_wan_call

Now = tuple[int, int]
WHOLE = {"density": 1.0, "dense_steps": 0.0, "dense_layers": 0}


def each(steps: int, times: int = 1) -> list[Now]:
    return [(step, steps) for step in range(steps)] * times


@dataclass(frozen=True)
class OtherCall:
    """A pipeline, its call, and of each step the clock's word and the frames of the sparse video."""

    pipe: Callable[[], Any]
    call: Callable[[], dict[str, Any]]
    nows: list[Now]
    frames: list[int]


def pyramid() -> HeliosPyramidPipeline:
    """Each stage is a schedule of its own, at twice the size of the one before; it never says which step runs.

    With the default gamma, 1/3, the covariance of its noise is singular but for rounding: some CPUs find no factor of it.
    """
    scheduler = HeliosScheduler(stages=2, stage_range=[0, 0.5, 1], gamma=0.3)
    parts = tiny_helios().components
    return quiet(
        HeliosPyramidPipeline(**WITHOUT_TEXT, vae=parts["vae"], transformer=parts["transformer"], scheduler=scheduler)
    )


def pyramid_call() -> dict[str, Any]:
    call = helios_call(pyramid_num_inference_steps_list=[2, 3])
    return {name: value for name, value in call.items() if name != "num_inference_steps"}


def forcing(pipeline: type) -> Any:
    return quiet(pipeline(**parts(inject_sample_info=True)))


def given_frame() -> dict[str, Any]:
    known = torch.randn(1, 1, 4, 32, 32, generator=torch.Generator().manual_seed(3))
    return {**tiny_wan_call(num_inference_steps=3), "video_latents": known}


def far_chunks(**overrides: Any) -> dict[str, Any]:
    """The third chunk sees the first in coarse patches and the second; no chunk is a number of whole blocks."""
    call = far_call(num_frames=9, width=80, num_inference_steps=2, output_type="latent")
    return {**call, "chunk_partition": [1, 2, 2], **overrides}


long_video = {"num_frames": 9, "base_num_frames": 5, "overlap_history": 3}
CALLS = {
    "Wan Animate, two segments": OtherCall(
        tiny_animate,
        partial(animate_call, frames=17, num_inference_steps=2, guidance_scale=1.0),
        each(2, times=2),
        [3] * 4,
    ),
    "ChronoEdit drops frames": OtherCall(
        tiny_chronoedit,
        partial(image_call, enable_temporal_reasoning=True, num_temporal_reasoning_steps=2, num_frames=9),
        each(5),
        [5, 5, 2, 2, 2],
    ),
    "diffusion forcing, frame after frame": OtherCall(
        tiny_forcing, partial(forcing_call, ar_step=1, num_inference_steps=4), each(6), [3] * 6
    ),
    "diffusion forcing, long": OtherCall(
        tiny_forcing, partial(forcing_call, **long_video, num_inference_steps=2), each(2, times=3), [3] * 6
    ),
    "diffusion forcing, image": OtherCall(
        partial(forcing, SkyReelsV2DiffusionForcingImageToVideoPipeline),
        partial(forcing_call, image=picture(), num_inference_steps=3),
        each(3),
        [3] * 3,
    ),
    "diffusion forcing, video": OtherCall(
        partial(forcing, SkyReelsV2DiffusionForcingVideoToVideoPipeline),
        partial(
            forcing_call,
            video=[picture(seed) for seed in range(5)],
            **{**long_video, "base_num_frames": 9},
            num_inference_steps=3,
        ),
        each(3),
        [5] * 3,
    ),
    "AnyFlow with a known frame": OtherCall(tiny_anyflow, given_frame, each(3), [3] * 3),
    "AnyFlow-FAR, three chunks": OtherCall(tiny_far, far_chunks, each(2, times=3), [1, 1, 2, 2, 2, 2]),
    "Helios, two chunks": OtherCall(
        tiny_helios, partial(helios_call, num_frames=10, num_inference_steps=2), each(2, times=2), [3] * 4
    ),
    "Helios pyramid": OtherCall(pyramid, pyramid_call, each(2) + each(3), [3] * 5),
}


def latents(pipe: Any, other: OtherCall) -> np.ndarray:
    return np.asarray(pipe(**{**other.call(), "output_type": "latent"}).frames)


class Watch:
    """Attends densely and keeps the calls of the first layer and branch."""

    def __init__(self, seen: list[AttentionCall]) -> None:
        self.seen = seen

    def attend(self, call: AttentionCall, q: Any, k: Any, v: Any) -> torch.Tensor:
        assert call.dense is not None
        if call.layer == 0 and call.branch not in ("uncond", "branch 1"):
            self.seen.append(call)
        return call.dense(q, k, v)


@pytest.mark.parametrize("other", CALLS.values(), ids=CALLS)
def test_steps_and_sizes_are_those_of_the_pipeline(other: OtherCall) -> None:
    pipe = other.pipe()
    seen: list[AttentionCall] = []
    stock = latents(pipe, other)
    with attach(pipe, lambda site: Watch(seen)):
        assert np.abs(latents(pipe, other) - stock).max() <= 1e-4 * np.abs(stock).max()
    assert [call.now for call in seen] == other.nows
    assert [call.layout.frames for call in seen] == other.frames
    with patch(pipe, "cached", **WHOLE):
        assert np.abs(latents(pipe, other) - stock).max() <= 1e-4 * np.abs(stock).max()


def test_frames_that_see_no_later_ones_are_refused() -> None:
    pipe = tiny_forcing()
    with patch(pipe, "draft", **WHOLE), pytest.raises(ValueError, match="causal_block_size=1"):
        pipe(**forcing_call(num_frames=7, causal_block_size=2, ar_step=1, output_type="latent"))


def test_what_each_chunk_sees_of_those_before() -> None:
    pipe = tiny_far()
    seen: list[AttentionCall] = []
    with attach(pipe, lambda site: Watch(seen)):
        pipe(**far_chunks(num_inference_steps=1))
    # 16 x 20 tokens to a frame, 8 x 10 where it is compressed; zeros up to whole blocks of 128
    kinds = [[(each.kind, each.tokens, each.queries) for each in call.layout.segments] for call in seen]
    assert kinds == [
        [("video", 320, True), ("condition", 64, False)],
        [("history", 320, False), ("video", 640, True)],
        [("history", 80, False), ("history", 640, False), ("video", 640, True)],
    ]


def test_forwards_that_fill_a_cache_always_run() -> None:
    pipe = tiny_far()
    stock = pipe(**far_chunks(num_inference_steps=4)).frames
    with patch(pipe, schedule(steps=range(4))):
        assert torch.equal(pipe(**far_chunks(num_inference_steps=4)).frames, stock)
    with patch(pipe, schedule(steps=(0, 2, 3))) as done:
        assert not torch.equal(pipe(**far_chunks(num_inference_steps=4)).frames, stock)
        counts = done.report().forwards
        assert (counts.computed, counts.predicted) == (9, 3), "of three chunks; none of the two that fill the cache"


def test_sparse_chunks_see_all_that_is_cached() -> None:
    pipe = tiny_far()
    stock = pipe(**far_chunks()).frames
    with patch(pipe, "draft", density=0.4, dense_steps=0.0, dense_layers=0) as done:
        sparse = pipe(**far_chunks()).frames
        assert done.report().density < 1
    assert sparse.isfinite().all() and not torch.allclose(sparse, stock)


def test_chunks_without_a_cache_are_refused() -> None:
    pipe = tiny_far()
    with patch(pipe, "draft", **WHOLE), pytest.raises(ValueError, match="use_kv_cache=True"):
        pipe(**far_chunks(use_kv_cache=False))


def test_an_interrupted_call_leaves_no_cache_of_the_pipeline_behind() -> None:
    """A predicted output hands the pipeline's KV cache back, but a step cache does not keep it alive."""
    pipe, caches = tiny_far(), []

    class Stop(Exception):
        pass

    def stop(pipe: Any, step: int, timestep: Any, tensors: Any) -> dict[str, Any]:
        if step == 2:
            raise Stop
        return {}

    def look(module: Any, args: Any, kwargs: Any) -> None:
        caches.append(weakref.ref(kwargs["kv_cache"][0]["full_cache"]))

    hook = pipe.transformer.register_forward_pre_hook(look, with_kwargs=True)
    with patch(pipe, schedule(steps=(0, 2, 3))) as done:
        with pytest.raises(Stop):
            pipe(**far_chunks(num_inference_steps=4), callback_on_step_end=stop)
        assert done.report().forwards.predicted == 1
        gc.collect()
        assert caches and all(cache() is None for cache in caches)
        hook.remove()
        assert pipe(**far_chunks(num_inference_steps=4)).frames.isfinite().all()
