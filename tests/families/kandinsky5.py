"""Kandinsky 5, tiny: from text, and from an image with NABLA, at a threshold that selects everything."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    Kandinsky5I2VPipeline,
    Kandinsky5T2VPipeline,
    Kandinsky5Transformer3DModel,
)

from diffusers_accel.layout import TokenLayout
from tests.families.family import TinyFamily, noisy
from tests.tiny import LAYERS, POOLED_DIM, TEXT_DIM, TEXT_TOKENS, tiny_hunyuan_vae

NABLA = {
    "attention_type": "nabla",
    "attention_P": 1.0,
    "attention_wT": 3,
    "attention_wH": 3,
    "attention_wW": 3,
    "attention_add_sta": True,
    "attention_method": "topcdf",
}


def tiny_kandinsky5_transformer(**options: Any) -> Kandinsky5Transformer3DModel:
    torch.manual_seed(0)
    transformer = Kandinsky5Transformer3DModel(
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
        **options,
    )
    return noisy(transformer)


def tiny_kandinsky5(kind: Any = Kandinsky5T2VPipeline, **options: Any) -> Any:
    pipe = kind(
        transformer=tiny_kandinsky5_transformer(**options),
        vae=tiny_hunyuan_vae(),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_kandinsky5_nabla() -> Kandinsky5I2VPipeline:
    pipe = tiny_kandinsky5(Kandinsky5I2VPipeline, visual_cond=True, **NABLA)
    for module in pipe.transformer.visual_transformer_blocks:  # which alone takes NABLA's masks; text goes without
        module.self_attention.set_attention_backend("flex")
    return pipe


def tiny_kandinsky5_call(seed: int = 0, prompts: int = 1, **overrides: Any) -> dict[str, Any]:
    """Arguments for `pipe(**...)`: 9 frames of 64 x 64 -> 3 x 16 x 16 = 768 tokens; 5 steps with guidance."""
    generator = torch.Generator().manual_seed(seed)
    lengths = TEXT_TOKENS * torch.arange(prompts + 1, dtype=torch.int32)
    call: dict[str, Any] = {
        "prompt_embeds_qwen": torch.randn(prompts, TEXT_TOKENS, TEXT_DIM, generator=generator),
        "prompt_embeds_clip": torch.randn(prompts, POOLED_DIM, generator=generator),
        "prompt_cu_seqlens": lengths,
        "negative_prompt_embeds_qwen": torch.zeros(prompts, TEXT_TOKENS, TEXT_DIM),
        "negative_prompt_embeds_clip": torch.zeros(prompts, POOLED_DIM),
        "negative_prompt_cu_seqlens": lengths,
        "height": 64,
        "width": 64,
        "num_frames": 9,
        "num_inference_steps": 5,
        "guidance_scale": 3.0,
        "generator": generator,
        "output_type": "np",
    }
    return {**call, **overrides}


def tiny_kandinsky5_image_call(seed: int = 0, prompts: int = 1, **overrides: Any) -> dict[str, Any]:
    image = torch.rand(prompts, 3, 64, overrides.get("width", 64), generator=torch.Generator().manual_seed(1))
    frames = {
        "num_frames": 21
    }  # of fewer than 6 latent frames the pipeline makes NaN: it norms the first 4 by those behind
    return tiny_kandinsky5_call(seed, prompts, **{"image": image, **frames, **overrides})


# The pipelines name no branch, and repeat no embeddings that they are given.
BRANCHES = ("branch 0", "branch 1")
KANDINSKY5 = TinyFamily(tiny_kandinsky5, tiny_kandinsky5_call, TokenLayout(3, 16, 16), BRANCHES, several={"prompts": 2})
KANDINSKY5_NABLA = TinyFamily(
    tiny_kandinsky5_nabla,
    tiny_kandinsky5_image_call,
    TokenLayout(6, 16, 16),
    BRANCHES,
    bitwise=False,  # attention in another order
    several={"prompts": 2},
)
