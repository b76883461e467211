"""LTX-2 with its audio, tiny."""

from __future__ import annotations

from typing import Any

import numpy as np
import PIL.Image
import torch
from diffusers import (
    AutoencoderKLLTX2Audio,
    AutoencoderKLLTX2Video,
    FlowMatchEulerDiscreteScheduler,
    LTX2ConditionPipeline,
    LTX2ImageToVideoPipeline,
    LTX2Pipeline,
    LTX2VideoTransformer3DModel,
)
from diffusers.pipelines.ltx2 import LTX2TextConnectors, LTX2Vocoder
from diffusers.pipelines.ltx2.pipeline_ltx2_condition import LTX2VideoCondition

from diffusers_accel.layout import Segment, TokenLayout
from tests.families.family import TinyFamily
from tests.tiny import HEAD_DIM, HEADS, LAYERS, TEXT_DIM, TEXT_TOKENS, text_mask

AUDIO_DIM = 8  # of a head


def tiny_ltx2(cls: Any = LTX2Pipeline) -> Any:
    torch.manual_seed(0)
    transformer = LTX2VideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        cross_attention_dim=HEADS * HEAD_DIM,
        vae_scale_factors=(1, 2, 2),
        audio_in_channels=4,
        audio_out_channels=4,
        audio_num_attention_heads=HEADS,
        audio_attention_head_dim=AUDIO_DIM,
        audio_cross_attention_dim=HEADS * AUDIO_DIM,
        num_layers=LAYERS,
        caption_channels=TEXT_DIM,
        rope_type="split",
        perturbed_attn=True,
    )
    for table in (name for name, _ in transformer.named_parameters() if name.endswith("scale_shift_table")):
        torch.nn.init.normal_(transformer.get_parameter(table), std=0.1)
    connector = {"num_attention_heads": 2, "attention_head_dim": TEXT_DIM // 2, "num_layers": 1}
    connectors = LTX2TextConnectors(
        caption_channels=TEXT_DIM,
        text_proj_in_factor=1,
        **{f"video_connector_{name}": value for name, value in connector.items()},
        **{f"audio_connector_{name}": value for name, value in connector.items()},
        video_connector_num_learnable_registers=None,
        audio_connector_num_learnable_registers=None,
        connector_rope_base_seq_len=32,
        rope_double_precision=False,
        rope_type="split",
    )
    vae = AutoencoderKLLTX2Video(
        latent_channels=4,
        block_out_channels=(8,),
        decoder_block_out_channels=(8,),
        layers_per_block=(1,),
        decoder_layers_per_block=(1, 1),
        spatio_temporal_scaling=(True,),
        decoder_spatio_temporal_scaling=(True,),
        decoder_inject_noise=(False, False),
        downsample_type=("spatial",),
        upsample_type=("spatial",),
        upsample_residual=(False,),
        upsample_factor=(1,),
        patch_size=1,
        decoder_causal=False,
    )
    audio_vae = AutoencoderKLLTX2Audio(
        base_channels=4, ch_mult=(1,), num_res_blocks=1, in_channels=2, resolution=32, latent_channels=2, mel_bins=8
    )
    vocoder = LTX2Vocoder(
        in_channels=audio_vae.config.output_channels * audio_vae.config.mel_bins,
        hidden_channels=8,
        upsample_kernel_sizes=[4],
        upsample_factors=[2],
        resnet_kernel_sizes=[3],
        resnet_dilations=[[1]],
    )
    pipe = cls(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae.eval(),
        audio_vae=audio_vae.eval(),
        text_encoder=None,
        tokenizer=None,
        connectors=connectors.eval(),
        transformer=transformer.eval(),
        vocoder=vocoder.eval(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_ltx2_call(seed: int = 0, prompts: int = 1, **overrides: Any) -> dict[str, Any]:
    """5 frames of 32 x 32 -> 3 x 16 x 16 = 768 tokens; 5 steps with text guidance, and a pass without exchange with the audio."""
    generator = torch.Generator().manual_seed(seed)
    call: dict[str, Any] = {
        "prompt_embeds": torch.randn(prompts, TEXT_TOKENS, TEXT_DIM, generator=generator),
        "prompt_attention_mask": text_mask(*[7] * prompts).flip(1),
        "negative_prompt_embeds": torch.zeros(prompts, TEXT_TOKENS, TEXT_DIM),
        "negative_prompt_attention_mask": text_mask(*[4] * prompts).flip(1),
        "height": 32,
        "width": 32,
        "num_frames": 5,
        "num_inference_steps": 5,
        "guidance_scale": 3.0,
        "audio_guidance_scale": 3.0,
        "modality_scale": 2.0,
        "audio_modality_scale": 2.0,
        "stg_scale": 0.0,
        "audio_stg_scale": 0.0,
        "spatio_temporal_guidance_blocks": None,
        "generator": generator,
        "output_type": "np",
    }
    return {**call, **overrides}


def picture() -> PIL.Image.Image:
    pixels = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    return PIL.Image.fromarray(pixels)


def with_image(**overrides: Any) -> dict[str, Any]:
    return tiny_ltx2_call(**{"image": picture(), "image_crf": 0, **overrides})


def with_frames(**overrides: Any) -> dict[str, Any]:
    """The first frame, which stands in its place, and the last, whose tokens are appended."""
    conditions = [LTX2VideoCondition(picture(), index, 1.0, crf=0) for index in (0, 2)]
    return tiny_ltx2_call(**{"conditions": conditions, **overrides})


BRANCHES = ("cond_uncond", "uncond_modality")
ALONE = {"guidance_scale": 1.0, "audio_guidance_scale": 1.0, "modality_scale": 1.0, "audio_modality_scale": 1.0}
COMMON: dict[str, Any] = {"branches": BRANCHES, "alone": ALONE, "size": {"width": 64}}
VIDEO = Segment.video((3, 16, 16))
# Embeddings that the pipeline is given are not repeated for several videos.
LTX2 = TinyFamily(tiny_ltx2, tiny_ltx2_call, TokenLayout.of(VIDEO), several={"prompts": 2}, **COMMON)
LTX2_IMAGE = TinyFamily(
    lambda: tiny_ltx2(LTX2ImageToVideoPipeline), with_image, TokenLayout.of(VIDEO), several={"prompts": 2}, **COMMON
)
LTX2_CONDITION = TinyFamily(
    lambda: tiny_ltx2(LTX2ConditionPipeline),
    with_frames,
    TokenLayout.of(VIDEO, Segment("condition", 256)),
    several={"prompts": 2},
    **COMMON,
)
