"""Cosmos 3: text tokens attend among themselves; those that are generated read them and each other.

So a layer has two calls of attention: the causal one of the text, which stays as it is, and that of video, sound and actions,
whose keys begin with those of the text. Eight heads of keys serve all query heads. One sample a forward; guidance is two named
forwards.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from diffusers_accel.families.family import Family, Observation, argument, attention_of, optional
from diffusers_accel.layout import Segment, TokenLayout
from diffusers_accel.shape import ModelShape

SOUND, ACTION = ("sound_token_shapes", 12), ("action_token_shapes", 18)  # names and positions of arguments


def _shape(transformer: Any) -> ModelShape:
    config = transformer.config
    return ModelShape(config.num_hidden_layers, config.num_attention_heads, config.head_dim)


def _observe(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Observation:
    grids = argument(args, kwargs, "vision_token_shapes", 6)
    if len(grids) != 1:
        raise ValueError(
            f"expected one video (or image) in a forward of Cosmos 3, found {len(grids)}: generate one at a time"
        )
    beside = [optional(args, kwargs, name, at) or [] for name, at in (SOUND, ACTION)]
    text = int(argument(args, kwargs, "und_len", 3))
    return (text, *grids[0], *(sum(shape[0] for shape in shapes) for shapes in beside))


def _layout(config: Any, observation: Observation) -> TokenLayout:
    """Keys of the text, then the video, sound and actions."""
    text, frames, height, width, sound, action = observation
    segments = [Segment("text", text, queries=False), Segment.video((frames, height, width))]
    segments += [Segment("audio", sound)] if sound else []
    segments += [Segment("condition", action)] if action else []
    return TokenLayout.of(*segments)


def _text(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    tokens: Tensor = argument(args, kwargs, "input_ids", 0)
    return tokens


def _output_projection(transformer: Any, name: str) -> Callable[[Tensor], Tensor]:
    """Of what is generated."""
    linear: Callable[[Tensor], Tensor] = transformer.get_submodule(name).to_add_out
    return linear


def _is_text(call: Mapping[str, Any]) -> bool:
    return bool(call.get("is_causal"))


COSMOS3 = Family(
    name="cosmos3",
    transformer="diffusers.models.transformers.transformer_cosmos3.Cosmos3OmniTransformer",
    attention_call="dispatch_attention_fn",
    self_attention=attention_of("layers", named="self_attn"),
    shape=_shape,
    observe=_observe,
    layout=_layout,
    text=_text,
    beside=_is_text,
    output_projection=_output_projection,
    latents=("vision_tokens", "sound_tokens", "action_tokens"),
    timestep="vision_timesteps",
)
