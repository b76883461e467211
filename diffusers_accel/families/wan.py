"""Wan 2.1 and 2.2: text and images by cross-attention or as channels only, CFG as two branches, in 2.2 two transformers.

Image to video, video to video and Lucy Edit are the same class: what they are given are further channels of the latents, or a
timestep for each token.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffusers_accel.families.family import Family, Observation, argument, attention_of, patched, text_at
from diffusers_accel.layout import TokenLayout


def observe_latents(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Observation:
    """Sizes of latents [B, C, frames, height, width]."""
    return tuple(argument(args, kwargs, "hidden_states", 0).shape[2:])


def layout_of_latents(config: Any, observation: Observation) -> TokenLayout:
    """Video only, in patches."""
    return TokenLayout(*patched(observation, config.patch_size))


# Of the timestep alone: as it is, and as the blocks are modulated by it.
TIME_EMBEDDINGS = {"time": "condition_embedder.time_embedder", "time_projection": "condition_embedder.time_proj"}

WAN = Family(
    name="wan",
    transformer="diffusers.models.transformers.transformer_wan.WanTransformer3DModel",
    attention_call="dispatch_attention_fn",
    self_attention=attention_of("blocks"),
    observe=observe_latents,
    layout=layout_of_latents,
    text=text_at(2),
    indicators=TIME_EMBEDDINGS,
)
