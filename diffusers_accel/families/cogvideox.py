"""CogVideoX 1.0 and 1.5: text in front of the video in one sequence, all of it read, CFG as one pass over both branches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from diffusers_accel.families.family import Family, Observation, argument
from diffusers_accel.layout import TokenLayout
from diffusers_accel.shape import ModelShape


def _self_attention(transformer: Any) -> list[tuple[str, nn.Module]]:
    return [
        (f"transformer_blocks.{index}.attn1", block.attn1) for index, block in enumerate(transformer.transformer_blocks)
    ]


def _shape(transformer: Any) -> ModelShape:
    config = transformer.config
    return ModelShape(len(transformer.transformer_blocks), config.num_attention_heads, config.attention_head_dim)


def _observe(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Observation:
    _, frames, _, height, width = argument(args, kwargs, "hidden_states", 0).shape
    return frames, height, width, _text(args, kwargs).shape[1]


def _text(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    text: Tensor = argument(args, kwargs, "encoder_hidden_states", 1)
    return text


def _layout(config: Any, observation: Observation) -> TokenLayout:
    """The text, then latents [B, frames, C, height, width] in patches, which span several frames in 1.5 only."""
    frames, height, width, text = observation
    patch = config.patch_size
    return TokenLayout(frames // (config.patch_size_t or 1), height // patch, width // patch, text, "start")


def _output_projection(transformer: Any, name: str) -> Callable[[Tensor], Tensor]:
    linear: Callable[[Tensor], Tensor] = transformer.get_submodule(name).to_out[0]
    return linear


COGVIDEOX = Family(
    name="cogvideox",
    transformer="diffusers.models.transformers.cogvideox_transformer_3d.CogVideoXTransformer3DModel",
    attention_call="F.scaled_dot_product_attention",
    self_attention=_self_attention,
    shape=_shape,
    observe=_observe,
    layout=_layout,
    output_projection=_output_projection,
    text=_text,
    channels=2,
)
