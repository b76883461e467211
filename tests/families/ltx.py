"""LTX-Video, tiny."""

from __future__ import annotations

from typing import Any

import numpy as np
import PIL.Image
import torch
from diffusers import (
    AutoencoderKLLTXVideo,
    FlowMatchEulerDiscreteScheduler,
    LTXConditionPipeline,
    LTXPipeline,
    LTXVideoTransformer3DModel,
)
from diffusers.pipelines.ltx.pipeline_ltx_condition import LTXVideoCondition

from diffusers_accel.layout import Segment, TokenLayout
from tests.families.family import TinyFamily
from tests.tiny import HEAD_DIM, HEADS, LAYERS, TEXT_DIM, TEXT_TOKENS, text_mask


def tiny_ltx(cls: Any = LTXPipeline) -> Any:
    torch.manual_seed(0)
    transformer = LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        cross_attention_dim=HEADS * HEAD_DIM,
        num_layers=LAYERS,
        caption_channels=TEXT_DIM,
    )
    vae = AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        patch_size=1,
    )
    pipe = cls(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae.eval(),
        text_encoder=None,
        tokenizer=None,
        transformer=transformer.eval(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_ltx_call(seed: int = 0, prompts: int = 1, **overrides: Any) -> dict[str, Any]:
    """Arguments for `pipe(**...)`: 9 frames of 64 x 64 -> 3 x 16 x 16 = 768 tokens; 5 steps with guidance."""
    generator = torch.Generator().manual_seed(seed)
    call: dict[str, Any] = {
        "prompt_embeds": torch.randn(prompts, TEXT_TOKENS, TEXT_DIM, generator=generator),
        "prompt_attention_mask": text_mask(*[7] * prompts),
        "negative_prompt_embeds": torch.zeros(prompts, TEXT_TOKENS, TEXT_DIM),
        "negative_prompt_attention_mask": text_mask(*[4] * prompts),
        "height": 64,
        "width": 64,
        "num_frames": 9,
        "num_inference_steps": 5,
        "guidance_scale": 3.0,
        "generator": generator,
        "output_type": "np",
    }
    return {**call, **overrides}


# Embeddings that the pipeline is given are not repeated for several videos.
LTX = TinyFamily(tiny_ltx, tiny_ltx_call, TokenLayout(3, 16, 16), ("cond_uncond",), several={"prompts": 2})


def with_frames(**overrides: Any) -> dict[str, Any]:
    """The first frame, which stands in its place, and the last, whose 256 tokens stand in front of the video."""
    pixels = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    image = PIL.Image.fromarray(pixels)
    conditions = [LTXVideoCondition(image=image, frame_index=index) for index in (0, 8)]
    return tiny_ltx_call(**{"conditions": conditions, **overrides})


LTX_CONDITION = TinyFamily(
    lambda: tiny_ltx(LTXConditionPipeline),
    with_frames,
    TokenLayout.of(Segment("condition", 256), Segment.video((3, 16, 16))),
    ("cond_uncond",),
    several={},  # frames that are appended are not repeated for several prompts, nor embeddings for several videos
)
