"""EasyAnimate 5.1: text in front of the video in one sequence, none of it masked, both branches of guidance in one forward."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffusers_accel.families.family import Family, Observation, argument, optional, text_at
from diffusers_accel.layout import TokenLayout

_text = text_at(3)


def _observe(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Observation:
    more = optional(args, kwargs, "encoder_hidden_states_t5", 4)
    text = _text(args, kwargs).shape[1] + (0 if more is None else more.shape[1])
    return (*argument(args, kwargs, "hidden_states", 0).shape[2:], text)


def _layout(config: Any, observation: Observation) -> TokenLayout:
    """The text, of both encoders where there are two, then latents [B, C, frames, height, width] in patches of one frame."""
    frames, height, width, text = observation
    patch = config.patch_size
    return TokenLayout(frames, height // patch, width // patch, text, "start")


EASYANIMATE = Family(
    name="easyanimate",
    transformer="diffusers.models.transformers.transformer_easyanimate.EasyAnimateTransformer3DModel",
    attention_call="F.scaled_dot_product_attention",
    observe=_observe,
    layout=_layout,
    text=_text,
)
