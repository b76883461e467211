"""Cosmos 1, 2 and 2.5: video tokens alone, text by cross-attention, guidance as two forwards that the pipelines do not name.

Conditions of video-to-world stand in the latents' own frames and in channels beside them, so that all tokens are video.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from diffusers_accel.families.family import Family, Observation, argument, text_at
from diffusers_accel.layout import TokenLayout

_given = text_at(2)


def _text(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """The text of (text, image), as Cosmos Transfer 2.5 gives them."""
    given: Any = _given(args, kwargs)
    text: Tensor = given[0] if isinstance(given, tuple) else given
    return text


def _observe(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Observation:
    return tuple(argument(args, kwargs, "hidden_states", 0).shape[2:])


def _layout(config: Any, observation: Observation) -> TokenLayout:
    """Latents [B, C, frames, height, width] in patches."""
    frames, height, width = (size // patch for size, patch in zip(observation, config.patch_size, strict=True))
    return TokenLayout(frames, height, width)


COSMOS = Family(
    name="cosmos",
    transformer="diffusers.models.transformers.transformer_cosmos.CosmosTransformer3DModel",
    attention_call="dispatch_attention_fn",
    observe=_observe,
    layout=_layout,
    text=_text,
)
