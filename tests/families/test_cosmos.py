"""Cosmos from a picture or a clip: known frames lie among the video's, so that the layout is that of a call from text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from diffusers_accel import patch
from diffusers_accel.api import attach
from tests.families import TINY
from tests.families.test_every_family import Watch, latents

GENERATOR = torch.Generator().manual_seed(1)
CLIP = torch.rand(5, 3, 64, 64, generator=GENERATOR)
CONDITIONS: dict[str, tuple[str, Callable[[], dict[str, Any]]]] = {
    "2.5 from a clip": ("cosmos, 2.5", lambda: {"video": CLIP[None], "num_latent_conditional_frames": 1}),
    "3 from a picture": ("cosmos3", lambda: {"image": CLIP[:1]}),
    "3 from a clip": ("cosmos3", lambda: {"video": CLIP, "condition_frame_indexes_vision": (0,)}),
}


@pytest.mark.parametrize(("name", "condition"), CONDITIONS.values(), ids=CONDITIONS)
def test_known_frames_are_video_like_any_other(name: str, condition: Callable[[], dict[str, Any]]) -> None:
    tiny = TINY[name]
    pipe, seen = tiny.pipe(), []
    with attach(pipe, lambda site: Watch(seen)):
        stock = latents(tiny, pipe, **condition())
    assert {call.layout for call in seen} == {tiny.layout} and [call.now for call in seen][-1] == (4, 5)
    with patch(pipe, "pattern", density=1.0, dense_steps=0.0):
        np.testing.assert_allclose(latents(tiny, pipe, **condition()), stock, atol=1e-4)
    assert not np.array_equal(stock, latents(tiny, pipe))
