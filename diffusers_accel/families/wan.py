"""Wan 2.1 and 2.2 text-to-video: text by cross-attention only, CFG as two passes, and in 2.2 two transformers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from diffusers_accel.families.family import Family, Observation, argument
from diffusers_accel.layout import TokenLayout
from diffusers_accel.shape import ModelShape


def _self_attention(transformer: Any) -> list[tuple[str, nn.Module]]:
    return [(f"blocks.{index}.attn1", block.attn1) for index, block in enumerate(transformer.blocks)]


def _shape(transformer: Any) -> ModelShape:
    config = transformer.config
    return ModelShape(len(transformer.blocks), config.num_attention_heads, config.attention_head_dim)


def _observe(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Observation:
    return tuple(argument(args, kwargs, "hidden_states", 0).shape[2:])


def _text(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    text: Tensor = argument(args, kwargs, "encoder_hidden_states", 2)
    return text


def _layout(config: Any, observation: Observation) -> TokenLayout:
    """Latents [B, C, frames, height, width] in patches."""
    frames, height, width = (size // patch for size, patch in zip(observation, config.patch_size, strict=True))
    return TokenLayout(frames, height, width)


def _output_projection(transformer: Any, name: str) -> Callable[[Tensor], Tensor]:
    linear: Callable[[Tensor], Tensor] = transformer.get_submodule(name).to_out[0]
    return linear


WAN = Family(
    name="wan",
    transformer="diffusers.models.transformers.transformer_wan.WanTransformer3DModel",
    attention_call="dispatch_attention_fn",
    self_attention=_self_attention,
    shape=_shape,
    observe=_observe,
    layout=_layout,
    output_projection=_output_projection,
    text=_text,
)
