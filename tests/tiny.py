"""Tiny real pipelines for tests: diffusers' own classes at the smallest sizes that keep every code path."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel

LAYERS, HEADS, HEAD_DIM, TEXT_DIM = 3, 4, 16, 32


def tiny_wan_transformer(seed: int = 0, layers: int = LAYERS, heads: int = HEADS) -> WanTransformer3DModel:
    torch.manual_seed(seed)
    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=heads,
        attention_head_dim=HEAD_DIM,
        in_channels=4,
        out_channels=4,
        text_dim=TEXT_DIM,
        freq_dim=32,
        ffn_dim=64,
        num_layers=layers,
        cross_attn_norm=True,
        rope_max_seq_len=64,
    ).eval()


def tiny_wan_vae(seed: int = 0) -> AutoencoderKLWan:
    torch.manual_seed(seed)
    return AutoencoderKLWan(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1],
        num_res_blocks=1,
        temperal_downsample=[True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
        scale_factor_spatial=2,
        scale_factor_temporal=2,
    ).eval()


def tiny_wan(experts: int = 1, seed: int = 0) -> WanPipeline:
    """A WanPipeline with random weights and no text encoder; two experts make it Wan 2.2's."""
    pipe = WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=tiny_wan_vae(seed),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        transformer=tiny_wan_transformer(seed),
        transformer_2=tiny_wan_transformer(seed + 1) if experts == 2 else None,
        boundary_ratio=0.9 if experts == 2 else None,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_wan_call(seed: int = 0, **overrides: Any) -> dict[str, Any]:
    """Arguments for `pipe(**...)`: 5 frames of 64 x 64 -> 3 x 16 x 16 = 768 tokens, 6 blocks of 128; 5 steps with guidance."""
    generator = torch.Generator().manual_seed(seed)
    call: dict[str, Any] = {
        "prompt_embeds": torch.randn(1, 8, TEXT_DIM, generator=generator),
        "negative_prompt_embeds": torch.zeros(1, 8, TEXT_DIM),
        "height": 64,
        "width": 64,
        "num_frames": 5,
        "num_inference_steps": 5,
        "guidance_scale": 3.0,
        "generator": generator,
        "output_type": "np",
    }
    return {**call, **overrides}
