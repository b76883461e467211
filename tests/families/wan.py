"""Wan 2.1 and 2.2, tiny: text to video; image to video by CLIP and channels (2.1) or a clean first frame (2.2 5B); Lucy Edit."""

from __future__ import annotations

from typing import Any

import numpy as np
import PIL.Image
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    LucyEditPipeline,
    WanImageToVideoPipeline,
    WanTransformer3DModel,
)
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

from diffusers_accel.layout import TokenLayout
from tests.families.family import TinyFamily
from tests.tiny import HEAD_DIM, HEADS, LAYERS, TEXT_DIM, tiny_wan, tiny_wan_call, tiny_wan_vae

IMAGE_DIM = 16
IMAGE_TEXT_TOKENS = 512  # the models that see an image take all before these for image tokens
CONFIG = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": HEADS,
    "attention_head_dim": HEAD_DIM,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": TEXT_DIM,
    "freq_dim": 32,
    "ffn_dim": 64,
    "num_layers": LAYERS,
    "cross_attn_norm": True,
    "rope_max_seq_len": 64,
}  # of Wan's transformer and those made from it
SEES_IMAGES = {"image_dim": IMAGE_DIM, "added_kv_proj_dim": HEADS * HEAD_DIM}
WITHOUT_TEXT: dict[str, Any] = {"tokenizer": None, "text_encoder": None}


def picture(seed: int = 0, size: int = 64) -> PIL.Image.Image:
    generator = np.random.default_rng(seed)
    return PIL.Image.fromarray(generator.integers(0, 256, (size, size, 3), dtype=np.uint8))


def tiny_clip() -> dict[str, Any]:
    """CLIP's image encoder and its processor: 5 tokens of an image."""
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=IMAGE_DIM,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
    )
    processor = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    return {"image_encoder": CLIPVisionModel(config).eval(), "image_processor": processor}


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def embeddings(tokens: int, prompts: int, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "prompt_embeds": torch.randn(prompts, tokens, TEXT_DIM, generator=generator),
        "negative_prompt_embeds": torch.zeros(prompts, tokens, TEXT_DIM),
    }


def image_call(prompts: int = 1, **overrides: Any) -> dict[str, Any]:
    return {**tiny_wan_call(), "image": picture(), **embeddings(IMAGE_TEXT_TOKENS, prompts), **overrides}


def tiny_image_to_video() -> WanImageToVideoPipeline:
    """2.1: the image's CLIP tokens beside the text, its latents and a mask as channels."""
    torch.manual_seed(0)
    return quiet(
        WanImageToVideoPipeline(
            **WITHOUT_TEXT,
            **tiny_clip(),
            vae=tiny_wan_vae(),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            transformer=WanTransformer3DModel(**{**CONFIG, **SEES_IMAGES, "in_channels": 4 + 2 + 4}).eval(),
        )
    )


def tiny_first_frame() -> WanImageToVideoPipeline:
    """2.2's 5B: the image is the first latent frame, whose tokens have timestep 0."""
    torch.manual_seed(0)
    return quiet(
        WanImageToVideoPipeline(
            **WITHOUT_TEXT,
            vae=tiny_wan_vae(),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            transformer=WanTransformer3DModel(**CONFIG).eval(),
            expand_timesteps=True,
        )
    )


def tiny_edit() -> LucyEditPipeline:
    torch.manual_seed(0)
    return quiet(
        LucyEditPipeline(
            **WITHOUT_TEXT,
            vae=tiny_wan_vae(),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            transformer=WanTransformer3DModel(**{**CONFIG, "in_channels": 8}).eval(),
            expand_timesteps=True,
        )
    )


def edit_call(**overrides: Any) -> dict[str, Any]:
    return {**tiny_wan_call(), "video": [picture(seed) for seed in range(5)], **overrides}


GRID, BRANCHES = TokenLayout(3, 16, 16), ("cond", "uncond")
WAN = TinyFamily(tiny_wan, tiny_wan_call, GRID, BRANCHES)
# The pipeline repeats CLIP's tokens for each prompt, not for each video.
WAN_IMAGE = TinyFamily(tiny_image_to_video, image_call, GRID, BRANCHES, several={"prompts": 2})
WAN_FIRST_FRAME = TinyFamily(tiny_first_frame, image_call, GRID, BRANCHES)
# One video for each prompt: the pipeline asserts that there are as many given as made.
WAN_EDIT = TinyFamily(tiny_edit, edit_call, GRID, BRANCHES, several={})
