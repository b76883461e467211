"""EasyAnimate 5.1, tiny; the last layer has one set of weights for text and video."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKLMagvit,
    EasyAnimatePipeline,
    EasyAnimateTransformer3DModel,
    FlowMatchEulerDiscreteScheduler,
)

from diffusers_accel.layout import TokenLayout
from tests.families.family import TinyFamily
from tests.tiny import HEAD_DIM, HEADS, LAYERS, TEXT_DIM, TEXT_TOKENS, text_mask


def tiny_easyanimate() -> EasyAnimatePipeline:
    torch.manual_seed(0)
    transformer = EasyAnimateTransformer3DModel(
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        in_channels=4,
        out_channels=4,
        patch_size=2,
        num_layers=LAYERS,
        mmdit_layers=LAYERS - 1,
        time_embed_dim=8,
        text_embed_dim=TEXT_DIM,
    )
    vae = AutoencoderKLMagvit(
        latent_channels=4,
        block_out_channels=(4, 4),
        down_block_types=("SpatialDownBlock3D", "SpatialTemporalDownBlock3D"),
        up_block_types=("SpatialUpBlock3D", "SpatialTemporalUpBlock3D"),
        layers_per_block=1,
        norm_num_groups=2,
        spatial_group_norm=False,
    )
    pipe = EasyAnimatePipeline(
        vae=vae.eval(),
        text_encoder=None,
        tokenizer=None,
        transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_easyanimate_call(seed: int = 0, prompts: int = 1, **overrides: Any) -> dict[str, Any]:
    """Arguments for `pipe(**...)`: 20 tokens of text, then 3 frames of 64 x 64 -> 3 x 16 x 16 = 768 tokens."""
    generator = torch.Generator().manual_seed(seed)
    call: dict[str, Any] = {
        "prompt_embeds": torch.randn(prompts, TEXT_TOKENS, TEXT_DIM, generator=generator),
        "prompt_attention_mask": text_mask(*[7] * prompts),
        "negative_prompt_embeds": torch.zeros(prompts, TEXT_TOKENS, TEXT_DIM),
        "negative_prompt_attention_mask": text_mask(*[4] * prompts),
        "height": 64,
        "width": 64,
        "num_frames": 3,
        "num_inference_steps": 5,
        "guidance_scale": 3.0,
        "generator": generator,
        "output_type": "np",
    }
    return {**call, **overrides}


# The pipeline names no branch.
EASYANIMATE = TinyFamily(
    tiny_easyanimate,
    tiny_easyanimate_call,
    TokenLayout(3, 16, 16, TEXT_TOKENS, "start"),
    ("branch 0",),
    several={"num_images_per_prompt": 2},
)
