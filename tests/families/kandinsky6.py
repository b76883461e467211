"""Kandinsky 6, tiny: video and audio, from text and from an image."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Kandinsky6TI2VAPipeline, Kandinsky6Transformer3DModel

from diffusers_accel.layout import Segment, TokenLayout
from tests.families.family import TinyFamily
from tests.tiny import LAYERS, POOLED_DIM, TEXT_DIM, TEXT_TOKENS, tiny_hunyuan_vae


class Sound:
    """Stands in for the decoder of audio and its vocoder: gives the latents back."""

    config = SimpleNamespace(sample_rate=24, scaling_factor=1.0)
    latent_hop_length = 1
    dtype = torch.float32

    def decode(self, latents: torch.Tensor, return_dict: bool) -> tuple[torch.Tensor]:
        return (latents,)

    def __call__(self, mel: torch.Tensor, return_dict: bool) -> tuple[torch.Tensor]:
        return (mel,)


def tiny_kandinsky6() -> Kandinsky6TI2VAPipeline:
    torch.manual_seed(0)
    transformer = Kandinsky6Transformer3DModel(
        in_visual_dim=4,
        out_visual_dim=4,
        in_text_dim=TEXT_DIM,
        in_text_dim2=POOLED_DIM,
        time_dim=8,
        model_dim=64,
        ff_dim=64,
        num_text_blocks=1,
        num_visual_blocks=LAYERS,
        axes_dims=(4, 6, 6),
        in_audio_dim=4,
        out_audio_dim=4,
        model_dim_a=32,
        axes_dims_a=(4, 6, 6),
        ca_rope=True,
        cross_gates=True,
        fix_modulation=True,
        visual_token_type_num_embeddings=2,
    )
    pipe = Kandinsky6TI2VAPipeline(
        transformer=transformer.eval(),
        vae=tiny_hunyuan_vae(),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
        audio_vae=Sound(),
        vocoder=Sound(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_kandinsky6_call(seed: int = 0, **overrides: Any) -> dict[str, Any]:
    """Arguments for `pipe(**...)`: 9 frames of 64 x 64 -> 3 x 16 x 16 = 768 tokens; 5 steps with guidance."""
    generator = torch.Generator().manual_seed(seed)
    call: dict[str, Any] = {
        "prompt_embeds": torch.randn(1, TEXT_TOKENS, TEXT_DIM, generator=generator),
        "pooled_prompt_embeds": torch.randn(1, POOLED_DIM, generator=generator),
        "negative_prompt_embeds": torch.zeros(1, TEXT_TOKENS, TEXT_DIM),
        "negative_pooled_prompt_embeds": torch.zeros(1, POOLED_DIM),
        "height": 64,
        "width": 64,
        "num_frames": 9,
        "num_inference_steps": 5,
        "guidance_scale": 3.0,
        "generator": generator,
        "output_type": "np",
    }
    return {**call, **overrides}


def tiny_kandinsky6_image_call(seed: int = 0, **overrides: Any) -> dict[str, Any]:
    """The same from an image, which is a frame more."""
    image = torch.rand(1, 3, 64, overrides.get("width", 64), generator=torch.Generator().manual_seed(1))
    return tiny_kandinsky6_call(seed, **{"image": image, **overrides})


KANDINSKY6 = TinyFamily(tiny_kandinsky6, tiny_kandinsky6_call, TokenLayout(3, 16, 16), ("cond", "uncond"))
KANDINSKY6_IMAGE = TinyFamily(
    tiny_kandinsky6,
    tiny_kandinsky6_image_call,
    TokenLayout.of(Segment.video((3, 16, 16)), Segment("reference", 256, (1, 16, 16))),
    ("cond", "uncond"),
)
