"""Cosmos 1, 2 and 2.5: video tokens alone, text by cross-attention, guidance as two forwards that the pipelines do not name.

Conditions of video-to-world stand in the latents' own frames and in channels beside them, so that all tokens are video.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from diffusers_accel.families.family import Family, text_at
from diffusers_accel.families.preset import Preset
from diffusers_accel.families.wan import layout_of_latents, observe_latents

_given = text_at(2)


def _text(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """The text of (text, image), as Cosmos Transfer 2.5 gives them."""
    given: Any = _given(args, kwargs)
    text: Tensor = given[0] if isinstance(given, tuple) else given
    return text


COSMOS = Family(
    name="cosmos",
    transformer="diffusers.models.transformers.transformer_cosmos.CosmosTransformer3DModel",
    attention_call="dispatch_attention_fn",
    observe=observe_latents,
    layout=layout_of_latents,
    text=_text,
    preset=Preset(0.3, 1, "SVG 30 % of the steps and 3 % of the layers"),
)
