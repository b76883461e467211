"""Tiny real pipelines for tests: diffusers' own classes at the smallest sizes that keep every code path."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    AutoencoderKLHunyuanVideo,
    AutoencoderKLWan,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
    WanPipeline,
    WanTransformer3DModel,
)

LAYERS, HEADS, HEAD_DIM, TEXT_DIM = 3, 4, 16, 32
TEXT_TOKENS, POOLED_DIM = 20, 8


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


def save_small_wan(path: Path) -> Path:
    """A pipeline of 2 layers x 2 heads in diffusers' own format, with text encoder and random weights; returns the folder."""
    from diffusers_accel.evals.toy.training import models

    torch.manual_seed(0)
    tokenizer = models.build_tokenizer()
    transformer = models.build_transformer(layers=2, heads=2, head_dim=32, ffn_dim=64)
    torch.nn.init.normal_(transformer.proj_out.weight, std=0.1)
    pipe = WanPipeline(
        tokenizer=tokenizer,
        text_encoder=models.build_text_encoder(len(tokenizer)),
        vae=models.build_autoencoder(),
        scheduler=models.build_scheduler(),
        transformer=transformer,
    )
    pipe.save_pretrained(path)
    return path


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


def tiny_hunyuan_transformer(seed: int = 0, image: str | None = None) -> HunyuanVideoTransformer3DModel:
    """One dual-stream and two single-stream blocks: LAYERS layers of self-attention. `image` is its image_condition_type."""
    torch.manual_seed(seed)
    return HunyuanVideoTransformer3DModel(
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
        image_condition_type=image,
    ).eval()


def tiny_hunyuan_vae(seed: int = 0) -> AutoencoderKLHunyuanVideo:
    torch.manual_seed(seed)
    return AutoencoderKLHunyuanVideo(
        latent_channels=4,
        down_block_types=("HunyuanVideoDownBlock3D",) * 3,
        up_block_types=("HunyuanVideoUpBlock3D",) * 3,
        block_out_channels=(4, 4, 4),
        layers_per_block=1,
        norm_num_groups=2,
        spatial_compression_ratio=2,
        temporal_compression_ratio=4,
        mid_block_add_attention=False,
    ).eval()


def tiny_hunyuan(seed: int = 0) -> HunyuanVideoPipeline:
    """A HunyuanVideoPipeline with random weights and no text encoders."""
    pipe = HunyuanVideoPipeline(
        text_encoder=None,
        tokenizer=None,
        transformer=tiny_hunyuan_transformer(seed),
        vae=tiny_hunyuan_vae(seed),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        text_encoder_2=None,
        tokenizer_2=None,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def text_mask(*lengths: int) -> torch.Tensor:
    """[prompts, TEXT_TOKENS]: as a tokenizer pads prompts of these lengths."""
    return (torch.arange(TEXT_TOKENS) < torch.tensor(lengths)[:, None]).long()


def tiny_hunyuan_call(seed: int = 0, lengths: tuple[int, ...] = (7,), true_cfg: bool = False, **overrides: Any) -> dict:
    """Arguments for `pipe(**...)`: 9 frames of 64 x 64 -> 3 x 16 x 16 = 768 tokens, then 20 of text of which `lengths` exist.

    One prompt for each length. `true_cfg` adds the second pass, under a negative prompt of 4 tokens.
    """
    generator = torch.Generator().manual_seed(seed)
    prompts = len(lengths)
    call: dict[str, Any] = {
        "prompt_embeds": torch.randn(prompts, TEXT_TOKENS, TEXT_DIM, generator=generator),
        "pooled_prompt_embeds": torch.randn(prompts, POOLED_DIM, generator=generator),
        "prompt_attention_mask": text_mask(*lengths),
        "height": 64,
        "width": 64,
        "num_frames": 9,
        "num_inference_steps": 5,
        "generator": generator,
        "output_type": "np",
    }
    if true_cfg:
        call |= {
            "true_cfg_scale": 3.0,
            "negative_prompt_embeds": torch.zeros(prompts, TEXT_TOKENS, TEXT_DIM),
            "negative_pooled_prompt_embeds": torch.zeros(prompts, POOLED_DIM),
            "negative_prompt_attention_mask": text_mask(*[4] * prompts),
        }
    return {**call, **overrides}


def tiny_cogvideox_transformer(version: str = "1.0", seed: int = 0) -> CogVideoXTransformer3DModel:
    """1.0 as its 2B checkpoint, with sine positions and patches of one frame; 1.5 with RoPE and patches of two."""
    torch.manual_seed(seed)
    return CogVideoXTransformer3DModel(
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=TEXT_DIM,
        num_layers=LAYERS,
        sample_width=32,
        sample_height=32,
        sample_frames=5,
        patch_size=2,
        patch_size_t=None if version == "1.0" else 2,
        temporal_compression_ratio=2,
        max_text_seq_length=TEXT_TOKENS,
        use_rotary_positional_embeddings=version != "1.0",
    ).eval()


def tiny_cogvideox_vae(seed: int = 0) -> AutoencoderKLCogVideoX:
    torch.manual_seed(seed)
    return AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 2,
        up_block_types=("CogVideoXUpBlock3D",) * 2,
        block_out_channels=(4, 4),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=2,
    ).eval()


def tiny_cogvideox(version: str = "1.0", seed: int = 0) -> CogVideoXPipeline:
    """A CogVideoXPipeline with random weights and no text encoder."""
    pipe = CogVideoXPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=tiny_cogvideox_vae(seed),
        transformer=tiny_cogvideox_transformer(version, seed),
        scheduler=CogVideoXDDIMScheduler(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_cogvideox_call(seed: int = 0, **overrides: Any) -> dict[str, Any]:
    """Arguments for `pipe(**...)`: 20 tokens of text, then 5 frames of 64 x 64 -> 3 x 16 x 16 = 768 tokens.

    1.5 pads the 3 latent frames to 4 and makes 2 of them: 512 tokens.
    """
    generator = torch.Generator().manual_seed(seed)
    call: dict[str, Any] = {
        "prompt_embeds": torch.randn(1, TEXT_TOKENS, TEXT_DIM, generator=generator),
        "negative_prompt_embeds": torch.zeros(1, TEXT_TOKENS, TEXT_DIM),
        "height": 64,
        "width": 64,
        "num_frames": 5,
        "num_inference_steps": 5,
        "guidance_scale": 3.0,
        "generator": generator,
        "output_type": "np",
    }
    return {**call, **overrides}
