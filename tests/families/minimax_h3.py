"""MiniMax-H3, tiny: the denoising part of its modular pipeline, from text and from a first and a last frame."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers import MiniMaxH3Scheduler, MiniMaxH3Transformer3DModel
from diffusers.modular_pipelines.minimax_h3.modular_blocks_minimax_h3 import (
    MiniMaxH3CoreDenoiseStep,
    MiniMaxH3FL2VACoreDenoiseStep,
)

from diffusers_accel.layout import Segment, TokenLayout
from tests.families.family import TinyFamily
from tests.tiny import HEAD_DIM, HEADS, LAYERS, TEXT_DIM, TEXT_TOKENS

FRAMES, AUDIO_ROWS = 37, 414  # of 124 frames, the shortest that it makes: 207 latents of audio in each of two channels


def tiny_minimax_h3_transformer() -> MiniMaxH3Transformer3DModel:
    torch.manual_seed(0)
    return MiniMaxH3Transformer3DModel(
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        hidden_size=48,
        num_layers=LAYERS,
        num_refiner_layers=1,
        ffn_dim=64,
        text_dim=TEXT_DIM,
        freq_dim=16,
        time_embed_hidden_dim=32,
        time_embed_dim=16,
        rope_freq_dim=2,
    ).eval()


def tiny_minimax_h3(blocks: Any = MiniMaxH3CoreDenoiseStep, named: str = "transformer") -> Any:
    pipe = blocks().init_pipeline()
    pipe.update_components(
        **{named: tiny_minimax_h3_transformer()},
        scheduler=MiniMaxH3Scheduler(shift=12.0),
        audio_scheduler=MiniMaxH3Scheduler(shift=3.0),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_minimax_h3_call(seed: int = 0, **overrides: Any) -> dict[str, Any]:
    """20 tokens of text, 414 of audio, then 124 frames of 128 x 192 -> 37 x 4 x 6 = 888 tokens."""
    generator = torch.Generator().manual_seed(seed)
    call: dict[str, Any] = {
        "prompt_embeds": torch.randn(1, TEXT_TOKENS, TEXT_DIM, generator=generator),
        "text_token_tags": torch.ones(TEXT_TOKENS, dtype=torch.long),
        "height": 128,
        "width": 192,
        "num_frames": 124,
        "num_inference_steps": 5,
        "generator": generator,
        "output_type": "np",
    }
    return {**call, **overrides}


def with_frames(seed: int = 0, **overrides: Any) -> dict[str, Any]:
    call = tiny_minimax_h3_call(seed, **overrides)
    shape = 1, 24, 1, call["height"] // 16, call["width"] // 16
    frames = [torch.randn(shape, generator=torch.Generator().manual_seed(anchor)) for anchor in (1, 2)]
    return {**call, "condition_latents": frames, "keyframe_anchors": ("first", "last")}


def run_latents(pipe: Any, call: dict[str, Any]) -> np.ndarray:
    """Its latents: decoding needs no transformer. The schedule that it is given has its end as one more step."""
    given = {**call, "num_inference_steps": call["num_inference_steps"] + 1}
    del given["output_type"]
    return np.asarray(pipe(**given, output="latents"))


# Guidance is distilled, and a request makes one video: so neither is there anything to override.
ONE = {"alone": {}, "several": {}}
LAST = (Segment("audio", AUDIO_ROWS), Segment.video((FRAMES, 4, 6)))
MINIMAX_H3 = TinyFamily(
    tiny_minimax_h3,
    tiny_minimax_h3_call,
    TokenLayout.of(Segment("text", TEXT_TOKENS), *LAST),
    ("branch 0",),  # a name of ours: the pipeline has none
    size={"width": 128},
    run=run_latents,
    **ONE,
)
MINIMAX_H3_FRAMES = TinyFamily(
    lambda: tiny_minimax_h3(MiniMaxH3FL2VACoreDenoiseStep),
    with_frames,
    TokenLayout.of(Segment("text", TEXT_TOKENS), Segment("reference", 48), *LAST),
    ("branch 0",),
    size={"width": 128},
    run=run_latents,
    **ONE,
)
