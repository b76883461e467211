"""HunyuanVideo: text behind the video in one sequence, padded, through dual-stream and then single-stream blocks.

Guidance is distilled into the model: one forward a step, or two with true CFG. The image-to-video checkpoints (`latent_concat`
and `token_replace`) are the same class with the same processor, and so are covered.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from diffusers_accel.families.family import Family, Observation, argument, attention_of, text_at
from diffusers_accel.families.preset import Preset
from diffusers_accel.families.reading import read_once, row_sums
from diffusers_accel.layout import TokenLayout
from diffusers_accel.shape import ModelShape

# Dual blocks, then single blocks; not the token refiner, which attends among text tokens only.
_self_attention = attention_of("transformer_blocks", "single_transformer_blocks", named="attn")
_text = text_at(2)


def _shape(transformer: Any) -> ModelShape:
    config = transformer.config
    return ModelShape(len(_self_attention(transformer)), config.num_attention_heads, config.attention_head_dim)


def _observe(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Observation:
    hidden_states = argument(args, kwargs, "hidden_states", 0)
    return (*hidden_states.shape[2:], _text(args, kwargs).shape[1])


def _layout(config: Any, observation: Observation) -> TokenLayout:
    """Latents [B, C, frames, height, width] in patches, then the text."""
    frames, height, width, text = observation
    patch = config.patch_size
    return TokenLayout(frames // config.patch_size_t, height // patch, width // patch, text, "end")


def _text_valid(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[int, ...]:
    return read_once(argument(args, kwargs, "encoder_attention_mask", 3), row_sums)


def _output_projection(transformer: Any, name: str) -> Callable[[Tensor], Tensor]:
    """Of the video tokens; single-stream blocks project attention and feed-forward together, attention's columns first."""
    block = transformer.get_submodule(name.rpartition(".")[0])
    if not block.attn.pre_only:
        linear: Callable[[Tensor], Tensor] = block.attn.to_out[0]
        return linear
    return lambda rows: block.proj_out(F.pad(rows, (0, block.proj_mlp.out_features)))


HUNYUAN_VIDEO = Family(
    name="hunyuan_video",
    transformer="diffusers.models.transformers.transformer_hunyuan_video.HunyuanVideoTransformer3DModel",
    attention_call="dispatch_attention_fn",
    self_attention=_self_attention,
    shape=_shape,
    observe=_observe,
    layout=_layout,
    output_projection=_output_projection,
    text=_text,
    text_valid=_text_valid,
    preset=Preset(0.2, 2, "SVG 10 % of the steps and 2 layers, Radial 24 % and none, DraftAttention 30 % and 2"),
)
