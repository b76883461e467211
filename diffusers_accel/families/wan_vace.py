"""Wan VACE: Wan with a second stream of blocks for the control video, whose tokens lie as those of the video do.

The control blocks run first, each with self-attention of its own. Reference images are further latent frames in front: they
are frames of the grid, as nothing in the forward's arguments tells them from the video. CFG is two branches.
"""

from __future__ import annotations

from typing import Any

from diffusers_accel.families.family import Family, attention_of, text_at
from diffusers_accel.families.wan import TIME_EMBEDDINGS, layout_of_latents, observe_latents
from diffusers_accel.shape import ModelShape

_self_attention = attention_of("vace_blocks", "blocks")


def _shape(transformer: Any) -> ModelShape:
    config = transformer.config
    return ModelShape(len(_self_attention(transformer)), config.num_attention_heads, config.attention_head_dim)


WAN_VACE = Family(
    name="wan_vace",
    transformer="diffusers.models.transformers.transformer_wan_vace.WanVACETransformer3DModel",
    attention_call="dispatch_attention_fn",
    self_attention=_self_attention,
    shape=_shape,
    observe=observe_latents,
    layout=layout_of_latents,
    text=text_at(2),
    indicators=TIME_EMBEDDINGS,
)
