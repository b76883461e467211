"""What is particular to MiniMax-H3: where the rows of its packed sequence stand is read from what its forward is given."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from diffusers import MiniMaxH3Transformer3DModel
from diffusers.modular_pipelines.minimax_h3.modular_blocks_minimax_h3 import MiniMaxH3Ref2VACoreDenoiseStep
from diffusers.modular_pipelines.minimax_h3.references import MiniMaxH3Reference

from diffusers_accel import list_families
from diffusers_accel.api import attach
from diffusers_accel.call import AttentionCall
from diffusers_accel.families.minimax_h3 import MINIMAX_H3
from diffusers_accel.families.reading import last_grid
from diffusers_accel.forwards.calls import ForwardReader
from diffusers_accel.layout import Segment, TokenLayout
from tests.families.minimax_h3 import (
    AUDIO_ROWS,
    run_latents,
    tiny_minimax_h3,
    tiny_minimax_h3_call,
    tiny_minimax_h3_transformer,
)
from tests.families.test_every_family import Watch
from tests.tiny import LAYERS, TEXT_TOKENS


def test_references_are_followed_in_their_own_transformer() -> None:
    """An image, and a video with its sound: each of another size than the video that is made."""
    pipe = tiny_minimax_h3(MiniMaxH3Ref2VACoreDenoiseStep, "transformer_ref")
    call = tiny_minimax_h3_call(num_inference_steps=2)
    references = [reference("image"), reference("video", has_audio=True)]
    call |= {
        "normalized_references": references,
        "condition_latents": [torch.ones(1, 24, 1, 8, 8), torch.ones(1, 24, 2, 4, 8)],
        "audio_condition_latents": [torch.ones(10, 32)],
    }
    seen: list[AttentionCall] = []
    with attach(pipe, lambda site: Watch(seen)):
        run_latents(pipe, call)
    assert [call.now for call in seen] == [(step, 2) for step in range(2) for _ in range(LAYERS)]
    layout = TokenLayout.of(
        Segment("text", TEXT_TOKENS),
        Segment("reference", 16),
        Segment("audio", 10),
        Segment("reference", 16),
        Segment("audio", AUDIO_ROWS),
        Segment.video((37, 4, 6)),
    )
    assert {(call.transformer, call.layout) for call in seen} == {("transformer_ref", layout)}


def reference(kind: str, **given: Any) -> Any:
    """As much of one as its layout asks for."""
    made = object.__new__(MiniMaxH3Reference)
    for name, value in {"kind": kind, "has_audio": False, **given}.items():
        object.__setattr__(made, name, value)
    return made


def grid(frames: int, height: int, width: int, start: float = 0.0) -> torch.Tensor:
    axes = start + torch.arange(frames) * 1.7, torch.arange(height) * 2.0, torch.arange(width) * 3.0
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).reshape(-1, 3)


@pytest.mark.parametrize("sizes", [(3, 4, 5), (1, 4, 5), (4, 1, 5), (3, 4, 1), (1, 1, 1)])
def test_the_grid_of_a_video_is_read_from_its_coordinates(sizes: tuple[int, int, int]) -> None:
    video = grid(*sizes, start=2.0)
    other = torch.tensor([[9.0, 50.0, 50.0]] * 7)
    assert last_grid(video) == sizes
    assert last_grid(torch.cat([other, video])) == sizes
    assert last_grid(torch.cat([grid(2, 4, 5, start=2.0), other[:1], video])) == sizes


def test_frames_of_another_time_in_front_are_not_the_video() -> None:
    """Such as keyframes, at the time of the first frame or of a later one."""
    video = grid(3, 4, 5, start=2.0)
    for start in (2.0, 3.7, 40.0):
        assert last_grid(torch.cat([grid(1, 4, 5, start=start), video])) == (3, 4, 5)


def test_step_caches_go_by_the_timestep_of_the_video() -> None:
    """Timesteps rise here, and those of conditions stay at 0.999: the largest would never change."""
    reader = ForwardReader(tiny_minimax_h3_transformer(), MINIMAX_H3)
    names = list(inspect.signature(MiniMaxH3Transformer3DModel.forward).parameters)[1:11]
    given = {**dict.fromkeys(names), "timestep": torch.tensor([0.2, 0.6, 0.999])}
    assert float(reader.read((), given).timestep) == pytest.approx(0.2)


def test_rows_behind_the_video_are_refused() -> None:
    given = {
        "video_indices": torch.arange(4, 64),
        "audio_indices": torch.arange(64, 70),
        "text_indices": torch.arange(4),
        "position_ids": torch.cat([torch.zeros(4, 3), grid(3, 4, 5), torch.zeros(6, 3)]),
    }
    with pytest.raises(
        ValueError, match=r"expected the last rows .* found the last of its video_indices in rows 4 to 64"
    ):
        MINIMAX_H3.observe((), given)
    assert "minimax_h3 (MiniMaxH3Transformer3DModel)" in list_families()
