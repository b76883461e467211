"""Latte: spatial blocks attend within each frame, temporal ones along time at each place; text by cross-attention, both branches
in one forward.

Only the spatial blocks attend among many tokens, and only they are patched: a temporal block sees as many tokens as there are
frames. So a call's layout is one frame, and its batch rows are those of guidance times frames.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffusers_accel.families.family import Family, Observation, argument, text_at
from diffusers_accel.layout import TokenLayout


def _observe(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Observation:
    return tuple(argument(args, kwargs, "hidden_states", 0).shape[3:])


def _layout(config: Any, observation: Observation) -> TokenLayout:
    """One frame of the latents [B, C, frames, height, width], in patches."""
    height, width = observation
    return TokenLayout(1, height // config.patch_size, width // config.patch_size)


LATTE = Family(
    name="latte",
    transformer="diffusers.models.transformers.latte_transformer_3d.LatteTransformer3DModel",
    attention_call="F.scaled_dot_product_attention",
    observe=_observe,
    layout=_layout,
    text=text_at(2),
)
