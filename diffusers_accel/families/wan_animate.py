"""Wan Animate: one latent frame of the reference image, then the video; pose and face are added to them, not to the sequence.

The face adapter attends frame by frame to other tokens and is left alone. CFG, off by default, is two branches.
"""

from __future__ import annotations

from typing import Any

from diffusers_accel.families.family import Family, Observation, attention_of, text_at
from diffusers_accel.families.wan import TIME_EMBEDDINGS, layout_of_latents, observe_latents
from diffusers_accel.layout import Segment, TokenLayout


def _layout(config: Any, observation: Observation) -> TokenLayout:
    frames, height, width = layout_of_latents(config, observation).grid
    reference = Segment("reference", height * width, (1, height, width))
    return TokenLayout.of(reference, Segment.video((frames - 1, height, width)))


WAN_ANIMATE = Family(
    name="wan_animate",
    transformer="diffusers.models.transformers.transformer_wan_animate.WanAnimateTransformer3DModel",
    attention_call="dispatch_attention_fn",
    self_attention=attention_of("blocks"),
    observe=observe_latents,
    layout=_layout,
    text=text_at(2),
    indicators=TIME_EMBEDDINGS,
)
