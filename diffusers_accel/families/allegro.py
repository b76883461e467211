"""Allegro: video tokens alone, text by cross-attention, both branches of guidance in one forward."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffusers_accel.families.family import Family, Observation, argument, text_at
from diffusers_accel.layout import TokenLayout


def _observe(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Observation:
    return tuple(argument(args, kwargs, "hidden_states", 0).shape[2:])


def _layout(config: Any, observation: Observation) -> TokenLayout:
    """Latents [B, C, frames, height, width] in patches of one frame, whatever patch_size_t is."""
    frames, height, width = observation
    patch = config.patch_size
    return TokenLayout(frames, height // patch, width // patch)


ALLEGRO = Family(
    name="allegro",
    transformer="diffusers.models.transformers.transformer_allegro.AllegroTransformer3DModel",
    attention_call="F.scaled_dot_product_attention",
    observe=_observe,
    layout=_layout,
    text=text_at(1),
)
