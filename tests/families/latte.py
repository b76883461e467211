"""Latte, tiny."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, LattePipeline, LatteTransformer3DModel

from diffusers_accel.layout import TokenLayout
from tests.families.family import TinyFamily, lively
from tests.tiny import HEAD_DIM, HEADS, LAYERS, TEXT_DIM, TEXT_TOKENS


def tiny_latte() -> LattePipeline:
    torch.manual_seed(0)
    transformer = LatteTransformer3DModel(
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        in_channels=4,
        out_channels=8,  # and a variance, as the public checkpoint has it
        num_layers=LAYERS,
        cross_attention_dim=HEADS * HEAD_DIM,
        attention_bias=True,
        sample_size=32,
        patch_size=1,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
        caption_channels=TEXT_DIM,
        video_length=3,
    )
    vae = AutoencoderKL(
        block_out_channels=(4, 4),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=2,
    )
    pipe = LattePipeline(
        tokenizer=None,
        text_encoder=None,
        vae=vae.eval(),
        transformer=lively(transformer),
        scheduler=DDIMScheduler(clip_sample=False),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_latte_call(seed: int = 0, prompts: int = 1, **overrides: Any) -> dict[str, Any]:
    """Arguments for `pipe(**...)`: 3 frames of 64 x 64 -> each 32 x 32 = 1,024 tokens; 5 steps with guidance."""
    generator = torch.Generator().manual_seed(seed)
    call: dict[str, Any] = {
        "prompt_embeds": torch.randn(prompts, TEXT_TOKENS, TEXT_DIM, generator=generator),
        "negative_prompt_embeds": torch.zeros(prompts, TEXT_TOKENS, TEXT_DIM),
        "negative_prompt": None,
        "mask_feature": False,
        "height": 64,
        "width": 64,
        "video_length": 3,
        "num_inference_steps": 5,
        "guidance_scale": 3.0,
        "generator": generator,
        "output_type": "np",
    }
    return {**call, **overrides}


# The pipeline names no branch.
LATTE = TinyFamily(tiny_latte, tiny_latte_call, TokenLayout(1, 32, 32), ("branch 0",), several={"prompts": 2})
