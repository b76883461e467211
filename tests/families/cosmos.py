"""Cosmos 1, 2 and 2.5, tiny."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKLCosmos,
    Cosmos2_5_PredictBasePipeline,
    Cosmos2VideoToWorldPipeline,
    CosmosTextToWorldPipeline,
    CosmosTransformer3DModel,
    CosmosVideoToWorldPipeline,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)

from diffusers_accel.layout import TokenLayout
from tests.families.family import TinyFamily
from tests.tiny import HEADS, LAYERS, TEXT_DIM, TEXT_TOKENS, tiny_wan_vae

HEAD_DIM = 18  # RoPE cuts it in three
VIDEO = [np.full((64, 64, 3), 90, dtype=np.uint8)]  # its frames are kept, and more are made


class Passes:
    """Stands in for the safety checker, which is a package of its own: lets all pass."""

    def to(self, device: Any) -> Passes:
        return self

    def check_text_safety(self, prompt: str) -> bool:
        return True

    def check_video_safety(self, frames: np.ndarray) -> np.ndarray:
        return frames


def tiny_cosmos_transformer(channels: int) -> CosmosTransformer3DModel:
    """Of latents with 4 channels, or 5 where one is a mask of known frames. A mask of padding would need torchvision."""
    torch.manual_seed(0)
    return CosmosTransformer3DModel(
        in_channels=channels,
        out_channels=4,
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        num_layers=LAYERS,
        mlp_ratio=2,
        text_embed_dim=TEXT_DIM,
        adaln_lora_dim=4,
        max_size=(8, 64, 64),
        concat_padding_mask=False,
    ).eval()


def tiny_cosmos_vae() -> AutoencoderKLCosmos:
    torch.manual_seed(0)
    return AutoencoderKLCosmos(
        latent_channels=4,
        encoder_block_out_channels=(4, 4),
        decode_block_out_channels=(4, 4),
        attention_resolutions=(),
        resolution=64,
        num_layers=1,
        patch_size=2,
        spatial_compression_ratio=2,
        temporal_compression_ratio=2,
        latents_mean=None,
        latents_std=None,
    ).eval()


def tiny_cosmos(kind: Any, vae: Any, channels: int, scheduler: Any) -> Any:
    pipe = kind(
        text_encoder=None,
        tokenizer=None,
        transformer=tiny_cosmos_transformer(channels),
        vae=vae,
        scheduler=scheduler,
        safety_checker=Passes(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_cosmos_1() -> CosmosTextToWorldPipeline:
    scheduler = EDMEulerScheduler(sigma_max=80.0, sigma_data=0.5)
    return tiny_cosmos(CosmosTextToWorldPipeline, tiny_cosmos_vae(), 4, scheduler)


def tiny_cosmos_1_video() -> CosmosVideoToWorldPipeline:
    scheduler = EDMEulerScheduler(sigma_max=80.0, sigma_data=0.5)
    return tiny_cosmos(CosmosVideoToWorldPipeline, tiny_cosmos_vae(), 5, scheduler)


def tiny_cosmos_2_video() -> Cosmos2VideoToWorldPipeline:
    scheduler = FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True)
    return tiny_cosmos(Cosmos2VideoToWorldPipeline, tiny_wan_vae(), 5, scheduler)


def tiny_cosmos_2_5() -> Cosmos2_5_PredictBasePipeline:
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    return tiny_cosmos(Cosmos2_5_PredictBasePipeline, tiny_wan_vae(), 5, scheduler)


def tiny_cosmos_call(seed: int = 0, prompts: int = 1, **overrides: Any) -> dict[str, Any]:
    """Arguments for `pipe(**...)`: 5 frames of 64 x 64 -> 3 x 16 x 16 = 768 tokens; 5 steps with guidance."""
    generator = torch.Generator().manual_seed(seed)
    call: dict[str, Any] = {
        "prompt_embeds": torch.randn(prompts, TEXT_TOKENS, TEXT_DIM, generator=generator),
        "negative_prompt_embeds": torch.zeros(prompts, TEXT_TOKENS, TEXT_DIM),
        "height": 64,
        "width": 64,
        "num_frames": 5,
        "num_inference_steps": 5,
        "guidance_scale": 3.0,
        "generator": generator,
        "output_type": "np",
    }
    return {**call, **overrides}


def tiny_cosmos_video_call(seed: int = 0, **overrides: Any) -> dict[str, Any]:
    return tiny_cosmos_call(seed, **{"video": VIDEO, **overrides})


# No pipeline names its branches.
TOKENS, BRANCHES = TokenLayout(3, 16, 16), ("branch 0", "branch 1")
COSMOS_1 = TinyFamily(tiny_cosmos_1, tiny_cosmos_call, TOKENS, BRANCHES)
COSMOS_1_VIDEO = TinyFamily(tiny_cosmos_1_video, tiny_cosmos_video_call, TOKENS, BRANCHES)
COSMOS_2_VIDEO = TinyFamily(tiny_cosmos_2_video, tiny_cosmos_video_call, TOKENS, BRANCHES)
COSMOS_2_5 = TinyFamily(tiny_cosmos_2_5, tiny_cosmos_call, TOKENS, BRANCHES)
