"""Allegro, tiny."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AllegroPipeline,
    AllegroTransformer3DModel,
    AutoencoderKLAllegro,
    EulerAncestralDiscreteScheduler,
)

from diffusers_accel.layout import TokenLayout
from tests.families.family import TinyFamily, lively
from tests.tiny import HEADS, LAYERS, TEXT_DIM, TEXT_TOKENS, text_mask

HEAD_DIM = 24  # RoPE cuts it in three


def tiny_allegro() -> AllegroPipeline:
    torch.manual_seed(0)
    transformer = AllegroTransformer3DModel(
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        num_layers=LAYERS,
        cross_attention_dim=HEADS * HEAD_DIM,
        sample_height=32,
        sample_width=32,
        sample_frames=3,
        caption_channels=TEXT_DIM,
    )
    vae = AutoencoderKLAllegro(
        down_block_types=("AllegroDownBlock3D",) * 2,
        up_block_types=("AllegroUpBlock3D",) * 2,
        block_out_channels=(4, 4),
        temporal_downsample_blocks=(True, False),
        temporal_upsample_blocks=(False, True),
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=2,
    )
    vae.enable_tiling()  # without which it decodes nothing; one tile holds the video
    vae.kernel = vae.stride = (6, 64, 64)
    pipe = AllegroPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=vae.eval(),
        transformer=lively(transformer),
        scheduler=EulerAncestralDiscreteScheduler(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_allegro_call(seed: int = 0, prompts: int = 1, **overrides: Any) -> dict[str, Any]:
    """Arguments for `pipe(**...)`: 6 frames of 64 x 64 -> 3 x 16 x 16 = 768 tokens; 5 steps with guidance."""
    generator = torch.Generator().manual_seed(seed)
    call: dict[str, Any] = {
        "prompt_embeds": torch.randn(prompts, TEXT_TOKENS, TEXT_DIM, generator=generator),
        "prompt_attention_mask": text_mask(*[7] * prompts),
        "negative_prompt": None,
        "negative_prompt_embeds": torch.zeros(prompts, TEXT_TOKENS, TEXT_DIM),
        "negative_prompt_attention_mask": text_mask(*[4] * prompts),
        "height": 64,
        "width": 64,
        "num_frames": 6,
        "num_inference_steps": 5,
        "guidance_scale": 3.0,
        "generator": generator,
        "output_type": "np",
    }
    return {**call, **overrides}


# The pipeline names no branch, and makes one video of each prompt.
ALLEGRO = TinyFamily(tiny_allegro, tiny_allegro_call, TokenLayout(3, 16, 16), ("branch 0",), several={"prompts": 2})
