"""HunyuanVideo 1.5, tiny: text to video, image to video."""

from __future__ import annotations

from typing import Any

import numpy as np
import PIL.Image
import torch
from diffusers import (
    AutoencoderKLHunyuanVideo15,
    ClassifierFreeGuidance,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideo15ImageToVideoPipeline,
    HunyuanVideo15Pipeline,
    HunyuanVideo15Transformer3DModel,
)

from diffusers_accel.layout import Segment, TokenLayout
from tests.families.family import TinyFamily
from tests.tiny import HEAD_DIM, HEADS, LAYERS, TEXT_DIM, TEXT_TOKENS, text_mask

GLYPH_TOKENS, GLYPH_DIM, IMAGE_TOKENS, IMAGE_DIM = 8, 12, 16, 16


def tiny_hunyuan15_transformer(
    layers: int = LAYERS, heads: int = HEADS, task: str = "t2v"
) -> HunyuanVideo15Transformer3DModel:
    torch.manual_seed(0)
    return HunyuanVideo15Transformer3DModel(
        in_channels=9,  # latents, those of an image, their mask
        out_channels=4,
        num_attention_heads=heads,
        attention_head_dim=HEAD_DIM,
        num_layers=layers,
        num_refiner_layers=1,
        mlp_ratio=2.0,
        text_embed_dim=TEXT_DIM,
        text_embed_2_dim=GLYPH_DIM,
        image_embed_dim=IMAGE_DIM,
        rope_axes_dim=(4, 6, 6),
        target_size=64,
        task_type=task,
    ).eval()


def _parts(task: str) -> dict[str, Any]:
    transformer = tiny_hunyuan15_transformer(task=task)
    vae = AutoencoderKLHunyuanVideo15(
        latent_channels=4,
        block_out_channels=(8, 8, 8),
        layers_per_block=1,
        spatial_compression_ratio=4,
        temporal_compression_ratio=4,
    )
    return {
        "text_encoder": None,
        "tokenizer": None,
        "transformer": transformer,
        "vae": vae.eval(),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=5.0),
        "text_encoder_2": None,
        "tokenizer_2": None,
        "guider": ClassifierFreeGuidance(guidance_scale=3.0),
    }


def tiny_hunyuan15() -> HunyuanVideo15Pipeline:
    pipe = HunyuanVideo15Pipeline(**_parts("t2v"))
    pipe.vision_num_semantic_tokens = IMAGE_TOKENS
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_hunyuan15_image() -> HunyuanVideo15ImageToVideoPipeline:
    from transformers import SiglipVisionConfig, SiglipVisionModel
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    parts = _parts("i2v")
    config = SiglipVisionConfig(
        hidden_size=IMAGE_DIM,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=16,
        patch_size=4,
    )
    pipe = HunyuanVideo15ImageToVideoPipeline(
        **parts,
        image_encoder=SiglipVisionModel(config).eval(),
        feature_extractor=SiglipImageProcessorPil(size={"height": 16, "width": 16}),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_hunyuan15_call(seed: int = 0, prompts: int = 1, **overrides: Any) -> dict[str, Any]:
    """9 frames of 64 x 64 -> 3 x 16 x 16 = 768 tokens, then 44 of text and image; 5 steps, and guidance of the guider."""
    generator = torch.Generator().manual_seed(seed)
    glyphs = text_mask(*[3] * prompts)[:, :GLYPH_TOKENS]
    call: dict[str, Any] = {
        "prompt_embeds": torch.randn(prompts, TEXT_TOKENS, TEXT_DIM, generator=generator),
        "prompt_embeds_mask": text_mask(*[7] * prompts),
        "negative_prompt_embeds": torch.zeros(prompts, TEXT_TOKENS, TEXT_DIM),
        "negative_prompt_embeds_mask": text_mask(*[4] * prompts),
        "prompt_embeds_2": torch.randn(prompts, GLYPH_TOKENS, GLYPH_DIM, generator=generator),
        "prompt_embeds_mask_2": glyphs,
        "negative_prompt_embeds_2": torch.zeros(prompts, GLYPH_TOKENS, GLYPH_DIM),
        "negative_prompt_embeds_mask_2": torch.zeros_like(glyphs),
        "height": 64,
        "width": 64,
        "num_frames": 9,
        "num_inference_steps": 5,
        "generator": generator,
        "output_type": "np",
    }
    return {**call, **overrides}


def picture(width: int = 64, height: int = 64) -> PIL.Image.Image:
    pixels = np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return PIL.Image.fromarray(pixels)


def tiny_hunyuan15_image_call(seed: int = 0, **overrides: Any) -> dict[str, Any]:
    """The same with an image, which says how large the video is."""
    call = tiny_hunyuan15_call(seed, **{"image": picture(), **overrides})
    return {name: value for name, value in call.items() if name not in ("height", "width")}


def run_guided(pipe: Any, call: dict[str, Any]) -> np.ndarray:
    """Its guidance is set at the guider."""
    pipe.guider.guidance_scale = call.pop("guidance_scale", 3.0)
    return np.asarray(pipe(**call).frames)


HUNYUAN_VIDEO15 = TinyFamily(
    tiny_hunyuan15,
    tiny_hunyuan15_call,
    TokenLayout(3, 16, 16, TEXT_TOKENS + GLYPH_TOKENS + IMAGE_TOKENS, "end", 10),
    ("pred_cond", "pred_uncond"),
    bitwise=False,  # keys are cut instead of masked
    several={
        "prompts": 2
    },  # two videos of one prompt fail in diffusers 0.42.1, which repeats all but its image embeddings
    run=run_guided,
    whole=False,  # it asks the image embeddings whether they are zero
)
HUNYUAN_VIDEO15_IMAGE = TinyFamily(
    tiny_hunyuan15_image,
    tiny_hunyuan15_image_call,
    TokenLayout.of(
        Segment.video((3, 16, 16)),
        Segment("image", IMAGE_TOKENS),
        Segment("text", TEXT_TOKENS + GLYPH_TOKENS, valid=10),
    ),
    ("pred_cond", "pred_uncond"),
    bitwise=False,
    size={"image": picture(96, 48)},
    run=run_guided,
    whole=False,
)
