"""ConsisID, tiny, with a face."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
from diffusers import CogVideoXDDIMScheduler, ConsisIDTransformer3DModel

from diffusers_accel.layout import TokenLayout
from tests.families.family import TinyFamily
from tests.tiny import HEAD_DIM, HEADS, LAYERS, TEXT_DIM, TEXT_TOKENS, tiny_cogvideox_vae

with patch.dict(
    sys.modules, {"cv2": ModuleType("cv2")}
):  # OpenCV draws key points of a face, which these calls have none of
    from diffusers.pipelines.consisid.pipeline_consisid import ConsisIDPipeline

ID_DIM, VIT_DIM, VIT_TOKENS = 10, 8, 6


def tiny_consisid() -> ConsisIDPipeline:
    torch.manual_seed(0)
    transformer = ConsisIDTransformer3DModel(
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        in_channels=8,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=TEXT_DIM,
        num_layers=LAYERS,
        sample_width=32,
        sample_height=32,
        sample_frames=5,
        patch_size=2,
        temporal_compression_ratio=2,
        max_text_seq_length=TEXT_TOKENS,
        use_rotary_positional_embeddings=True,
        is_train_face=True,
        cross_attn_interval=1,
        cross_attn_dim_head=8,
        cross_attn_num_heads=2,
        LFE_id_dim=ID_DIM,
        LFE_vit_dim=VIT_DIM,
        LFE_depth=5,
        LFE_dim_head=8,
        LFE_num_heads=2,
        LFE_num_querie=4,
        LFE_output_dim=HEADS * HEAD_DIM * 2 // 3,
        LFE_ff_mult=1,
    )
    pipe = ConsisIDPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=tiny_cogvideox_vae(),
        transformer=transformer.eval(),
        scheduler=CogVideoXDDIMScheduler(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_consisid_call(seed: int = 0, prompts: int = 1, **overrides: Any) -> dict[str, Any]:
    """Arguments for `pipe(**...)`: 20 tokens of text, then 5 frames of 64 x 64 -> 3 x 16 x 16 = 768 tokens."""
    generator = torch.Generator().manual_seed(seed)
    rows = 2 * prompts if overrides.get("guidance_scale", 3.0) > 1 else prompts
    call: dict[str, Any] = {
        "image": torch.rand(prompts, 3, 64, 64, generator=generator),
        "prompt_embeds": torch.randn(prompts, TEXT_TOKENS, TEXT_DIM, generator=generator),
        "negative_prompt_embeds": torch.zeros(prompts, TEXT_TOKENS, TEXT_DIM),
        "id_cond": torch.randn(1, ID_DIM, generator=generator).expand(rows, -1),
        "id_vit_hidden": [torch.randn(1, VIT_TOKENS, VIT_DIM, generator=generator).expand(rows, -1, -1)] * 5,
        "height": 64,
        "width": 64,
        "num_frames": 5,
        "num_inference_steps": 5,
        "guidance_scale": 3.0,
        "generator": generator,
        "output_type": "np",
    }
    return {**call, **overrides}


# The pipeline names no branch, and makes one video of each prompt.
CONSISID = TinyFamily(
    tiny_consisid,
    tiny_consisid_call,
    TokenLayout(3, 16, 16, TEXT_TOKENS, "start"),
    ("branch 0",),
    size={"width": 96, "image": torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(1))},
    several={"prompts": 2},
)
