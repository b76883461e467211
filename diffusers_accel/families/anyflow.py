"""AnyFlow: Wan's tokens, video only, from latents with frames before channels; both branches of CFG in one forward, unnamed.

Frames that the caller gives are frames of the video, at timestep 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffusers_accel.families.family import Family, Observation, argument, attention_of, text_at
from diffusers_accel.families.wan import layout_of_latents


def _observe(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Observation:
    _, frames, _, height, width = argument(args, kwargs, "hidden_states", 0).shape
    return frames, height, width


ANYFLOW = Family(
    name="anyflow",
    transformer="diffusers.models.transformers.transformer_anyflow.AnyFlowTransformer3DModel",
    attention_call="dispatch_attention_fn",
    self_attention=attention_of("blocks"),
    observe=_observe,
    layout=layout_of_latents,
    text=text_at(3),
    channels=2,
)
