"""Motif-Video, tiny: text to video, image to video."""

from __future__ import annotations

from typing import Any

import numpy as np
import PIL.Image
import torch
from diffusers import (
    ClassifierFreeGuidance,
    FlowMatchEulerDiscreteScheduler,
    MotifVideoImage2VideoPipeline,
    MotifVideoPipeline,
    MotifVideoTransformer3DModel,
)

from diffusers_accel.layout import Segment, TokenLayout
from tests.families.family import TinyFamily
from tests.tiny import HEAD_DIM, HEADS, TEXT_DIM, TEXT_TOKENS, text_mask, tiny_wan_vae

IMAGE_TOKENS, IMAGE_DIM = 16, 16


def tiny_motif_video(cls: Any = MotifVideoPipeline, **parts: Any) -> Any:
    """One dual-stream block, and two single-stream ones of which the last is the decoder."""
    torch.manual_seed(0)
    transformer = MotifVideoTransformer3DModel(
        in_channels=9,  # latents, those of an image, their mask
        out_channels=4,
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        num_layers=1,
        num_single_layers=2,
        num_decoder_layers=1,
        mlp_ratio=2.0,
        text_embed_dim=TEXT_DIM,
        image_embed_dim=IMAGE_DIM,
        rope_axes_dim=(4, 6, 6),
        enable_text_cross_attention_dual=True,
        enable_text_cross_attention_single=True,
    )
    pipe = cls(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=tiny_wan_vae(),
        tokenizer=None,
        transformer=transformer.eval(),
        guider=ClassifierFreeGuidance(guidance_scale=3.0),
        **{"text_encoder": None, "feature_extractor": None, **parts},
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


class ImageEncoder(torch.nn.Module):
    """As much as the pipeline asks of its text encoder where it is given the embeddings of a prompt."""

    def __init__(self) -> None:
        from transformers import SiglipVisionConfig, SiglipVisionModel

        super().__init__()
        config = SiglipVisionConfig(
            hidden_size=IMAGE_DIM,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=16,
            patch_size=4,
        )
        self.vision_tower = SiglipVisionModel(config).eval()
        self.dtype, self.device = torch.float32, torch.device("cpu")


def tiny_motif_video_image() -> Any:
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    torch.manual_seed(1)
    parts = ImageEncoder(), SiglipImageProcessorPil(size={"height": 16, "width": 16})
    return tiny_motif_video(MotifVideoImage2VideoPipeline, text_encoder=parts[0], feature_extractor=parts[1])


def tiny_motif_video_call(seed: int = 0, **overrides: Any) -> dict[str, Any]:
    """5 frames of 64 x 64 -> 3 x 16 x 16 = 768 tokens, then 20 of text; 5 steps, and guidance of the guider."""
    generator = torch.Generator().manual_seed(seed)
    call: dict[str, Any] = {
        "prompt_embeds": torch.randn(1, TEXT_TOKENS, TEXT_DIM, generator=generator),
        "prompt_attention_mask": text_mask(7),
        "negative_prompt_embeds": torch.zeros(1, TEXT_TOKENS, TEXT_DIM),
        "negative_prompt_attention_mask": text_mask(4),
        "height": 64,
        "width": 64,
        "num_frames": 5,
        "num_inference_steps": 5,
        "generator": generator,
        "output_type": "np",
    }
    return {**call, **overrides}


def with_image(**overrides: Any) -> dict[str, Any]:
    pixels = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    return tiny_motif_video_call(**{"image": PIL.Image.fromarray(pixels), "prompt": None, **overrides})


def run_guided(pipe: Any, call: dict[str, Any]) -> np.ndarray:
    """Its guidance is set at the guider."""
    pipe.guider.guidance_scale = call.pop("guidance_scale", 3.0)
    return np.asarray(pipe(**call).frames)


VIDEO, TEXT = Segment.video((3, 16, 16)), Segment("text", TEXT_TOKENS, valid=7)
DECODER = TokenLayout.of(VIDEO, Segment("condition", 768))
MOTIF_VIDEO = TinyFamily(
    tiny_motif_video,
    tiny_motif_video_call,
    TokenLayout.of(VIDEO, TEXT),
    ("pred_cond", "pred_uncond"),
    others=(DECODER,),
    bitwise=False,  # keys are cut instead of masked
    run=run_guided,
)
MOTIF_VIDEO_IMAGE = TinyFamily(
    tiny_motif_video_image,
    with_image,
    TokenLayout.of(VIDEO, Segment("image", IMAGE_TOKENS), TEXT),
    ("pred_cond", "pred_uncond"),
    others=(DECODER,),
    bitwise=False,
    several={},  # diffusers 0.42.1 repeats the latents of the image once too often, and fails with two videos of a prompt
    run=run_guided,
)
