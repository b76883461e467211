"""Wan Animate, tiny: one segment of 9 frames, with a latent frame of the reference in front of its 3."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    WanAnimatePipeline,
    WanAnimateTransformer3DModel,
)

from diffusers_accel.layout import Segment, TokenLayout
from tests.families.family import TinyFamily
from tests.families.wan import (
    CONFIG,
    IMAGE_TEXT_TOKENS,
    SEES_IMAGES,
    WITHOUT_TEXT,
    embeddings,
    picture,
    quiet,
    tiny_clip,
)

FACE = 16


def tiny_deep_vae() -> AutoencoderKLWan:
    """4 frames and 4 x 4 pixels to a latent: the face encoder takes the frames of a latent to be 4."""
    torch.manual_seed(0)
    return AutoencoderKLWan(
        base_dim=2,
        z_dim=4,
        dim_mult=[1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
        scale_factor_spatial=4,
        scale_factor_temporal=4,
    ).eval()


def tiny_animate() -> WanAnimatePipeline:
    torch.manual_seed(0)
    transformer = WanAnimateTransformer3DModel(
        **{**CONFIG, **SEES_IMAGES, "in_channels": 4 + 4 + 4},
        latent_channels=4,
        motion_encoder_channel_sizes={"4": 4, "8": 4, "16": 4},
        motion_encoder_size=FACE,
        motion_style_dim=8,
        motion_dim=4,
        motion_encoder_dim=8,
        face_encoder_hidden_dim=8,
        face_encoder_num_heads=2,
        inject_face_latents_blocks=3,
    )
    return quiet(
        WanAnimatePipeline(
            **WITHOUT_TEXT,
            **tiny_clip(),
            vae=tiny_deep_vae(),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            transformer=transformer.eval(),
        )
    )


def animate_call(frames: int = 9, prompts: int = 1, **overrides: Any) -> dict[str, Any]:
    call: dict[str, Any] = {
        **embeddings(IMAGE_TEXT_TOKENS, prompts),
        "image": picture(99, 128),
        "pose_video": [picture(seed, 128) for seed in range(frames)],
        "face_video": [picture(seed, FACE) for seed in range(frames)],
        "height": 128,
        "width": 128,
        "segment_frame_length": 9,
        "num_inference_steps": 5,
        "guidance_scale": 3.0,
        "generator": torch.Generator().manual_seed(0),
        "output_type": "np",
    }
    return {**call, **overrides}


# The pipeline makes several videos' conditions, but not their text where that is given as embeddings.
WAN_ANIMATE = TinyFamily(
    tiny_animate,
    animate_call,
    TokenLayout.of(Segment("reference", 256, (1, 16, 16)), Segment.video((3, 16, 16))),
    ("cond", "uncond"),
    size={"width": 192},
    several={"prompts": 2},
)
