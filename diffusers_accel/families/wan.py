"""Wan 2.1 and 2.2 text-to-video: text by cross-attention only, CFG as two branches, and in 2.2 two transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffusers_accel.families.family import Family, Observation, argument, attention_of, text_at
from diffusers_accel.layout import TokenLayout


def _observe(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Observation:
    return tuple(argument(args, kwargs, "hidden_states", 0).shape[2:])


def _layout(config: Any, observation: Observation) -> TokenLayout:
    """Latents [B, C, frames, height, width] in patches."""
    frames, height, width = (size // patch for size, patch in zip(observation, config.patch_size, strict=True))
    return TokenLayout(frames, height, width)


WAN = Family(
    name="wan",
    transformer="diffusers.models.transformers.transformer_wan.WanTransformer3DModel",
    attention_call="dispatch_attention_fn",
    self_attention=attention_of("blocks"),
    observe=_observe,
    layout=_layout,
    text=text_at(2),
)
