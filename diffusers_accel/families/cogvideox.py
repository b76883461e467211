"""CogVideoX 1.0 and 1.5: text in front of the video in one sequence, all of it read, both branches of CFG in one forward."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffusers_accel.families.family import Family, Observation, argument, text_at
from diffusers_accel.families.preset import Preset
from diffusers_accel.layout import TokenLayout

_text = text_at(1)


def _observe(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Observation:
    _, frames, _, height, width = argument(args, kwargs, "hidden_states", 0).shape
    return frames, height, width, _text(args, kwargs).shape[1]


def _layout(config: Any, observation: Observation) -> TokenLayout:
    """The text, then latents [B, frames, C, height, width] in patches, which span several frames in 1.5 only."""
    frames, height, width, text = observation
    patch = config.patch_size
    return TokenLayout(frames // (config.get("patch_size_t") or 1), height // patch, width // patch, text, "start")


COGVIDEOX = Family(
    name="cogvideox",
    transformer="diffusers.models.transformers.cogvideox_transformer_3d.CogVideoXTransformer3DModel",
    attention_call="F.scaled_dot_product_attention",
    observe=_observe,
    layout=_layout,
    text=_text,
    indicators={"time": "time_embedding"},
    channels=2,
    preset=Preset(0.1, 0, "Rectified SpaAttn 10 % of the steps of CogVideoX1.5, Sparse-vDiT none; no layers either"),
)
