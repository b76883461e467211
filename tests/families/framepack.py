"""FramePack with true guidance, tiny."""

from __future__ import annotations

from typing import Any

import numpy as np
import PIL.Image
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoFramepackPipeline,
    HunyuanVideoFramepackTransformer3DModel,
)

from diffusers_accel.layout import Segment, TokenLayout
from tests.families.family import TinyFamily
from tests.tiny import HEAD_DIM, HEADS, LAYERS, POOLED_DIM, TEXT_DIM, tiny_hunyuan_call, tiny_hunyuan_vae

IMAGE_TOKENS, IMAGE_DIM = 16, 16
HISTORY = 64 + 64 + 512  # 16 frames in patches of 4 x 8 x 8, 2 of 2 x 4 x 4, and the given and the last of 1 x 2 x 2


def tiny_framepack_transformer() -> HunyuanVideoFramepackTransformer3DModel:
    torch.manual_seed(0)
    return HunyuanVideoFramepackTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        num_layers=1,
        num_single_layers=LAYERS - 1,
        num_refiner_layers=1,
        mlp_ratio=2.0,
        text_embed_dim=TEXT_DIM,
        pooled_projection_dim=POOLED_DIM,
        rope_axes_dim=(4, 6, 6),
        has_image_proj=True,
        image_proj_dim=IMAGE_DIM,
        has_clean_x_embedder=True,
    ).eval()


def tiny_framepack() -> HunyuanVideoFramepackPipeline:
    from transformers import SiglipVisionConfig, SiglipVisionModel
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    transformer = tiny_framepack_transformer()
    config = SiglipVisionConfig(
        hidden_size=IMAGE_DIM,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=16,
        patch_size=4,
    )
    pipe = HunyuanVideoFramepackPipeline(
        text_encoder=None,
        tokenizer=None,
        transformer=transformer,
        vae=tiny_hunyuan_vae(),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        text_encoder_2=None,
        tokenizer_2=None,
        image_encoder=SiglipVisionModel(config).eval(),
        feature_extractor=SiglipImageProcessorPil(size={"height": 16, "width": 16}),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_framepack_call(seed: int = 0, **overrides: Any) -> dict[str, Any]:
    """640 tokens of history, 9 frames of 64 x 64 -> 3 x 16 x 16 = 768, 16 of an image, 7 of text (4 in the second pass)."""
    pixels = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    given = {"image": PIL.Image.fromarray(pixels), "latent_window_size": 3, **overrides}
    return tiny_hunyuan_call(seed, true_cfg=True, **given)


FRAMEPACK = TinyFamily(
    tiny_framepack,
    tiny_framepack_call,
    TokenLayout.of(
        Segment("history", HISTORY), Segment.video((3, 16, 16)), Segment("image", IMAGE_TOKENS), Segment("text", 7)
    ),
    ("branch 0", "branch 1"),  # names of ours: the pipeline has none
    alone={"true_cfg_scale": 1.0},
    several={},  # the pipeline makes one video of one prompt: more do not fit its history
)
