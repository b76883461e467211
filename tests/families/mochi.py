"""Mochi, tiny."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKLMochi, FlowMatchEulerDiscreteScheduler, MochiPipeline, MochiTransformer3DModel

from diffusers_accel.layout import TokenLayout
from tests.families.family import TinyFamily
from tests.tiny import HEAD_DIM, HEADS, LAYERS, TEXT_DIM, TEXT_TOKENS, text_mask


def tiny_mochi() -> MochiPipeline:
    torch.manual_seed(0)
    transformer = MochiTransformer3DModel(
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        num_layers=LAYERS,
        pooled_projection_dim=24,
        text_embed_dim=TEXT_DIM,
        time_embed_dim=8,
        max_sequence_length=TEXT_TOKENS,
    )
    torch.nn.init.normal_(transformer.pos_frequencies, std=0.1)  # zeros would turn nothing
    vae = AutoencoderKLMochi(
        encoder_block_out_channels=(32, 32, 32, 32),
        decoder_block_out_channels=(32, 32, 32, 32),
        layers_per_block=(1, 1, 1, 1, 1),
        temporal_expansions=(1, 2, 1),
        spatial_expansions=(2, 1, 1),
        add_attention_block=(False,) * 5,
    )
    pipe = MochiPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
        vae=vae.eval(),
        text_encoder=None,
        tokenizer=None,
        transformer=transformer.eval(),
    )
    # The pipeline assumes the compression of the real VAE: 8 x 8 pixels, 6 frames.
    pipe.vae_spatial_scale_factor, pipe.vae_temporal_scale_factor = 2, 2
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_mochi_call(seed: int = 0, lengths: tuple[int, ...] = (7,), **overrides: Any) -> dict[str, Any]:
    """5 frames of 64 x 64 -> 3 x 16 x 16 = 768 tokens, then 20 of text, of which `lengths` exist, or 7 without the prompt.

    Rows of equal lengths attend in one call.
    """
    generator, prompts = torch.Generator().manual_seed(seed), len(lengths)
    call: dict[str, Any] = {
        "prompt_embeds": torch.randn(prompts, TEXT_TOKENS, TEXT_DIM, generator=generator),
        "prompt_attention_mask": text_mask(*lengths).bool(),
        "negative_prompt_embeds": torch.zeros(prompts, TEXT_TOKENS, TEXT_DIM),
        "negative_prompt_attention_mask": text_mask(*[7] * prompts).bool(),
        "height": 64,
        "width": 64,
        "num_frames": 5,
        "num_inference_steps": 5,
        "guidance_scale": 3.0,
        "generator": generator,
        "output_type": "np",
    }
    return {**call, **overrides}


MOCHI = TinyFamily(
    tiny_mochi,
    tiny_mochi_call,
    TokenLayout(3, 16, 16, TEXT_TOKENS, "end", 7),
    ("cond_uncond",),
    several={"lengths": (7, 12)},  # embeddings that the pipeline is given are not repeated for several videos
    bitwise=False,  # rows of the batch attend together, and text that is padding as well
    least=2,
)
