"""What the Kandinsky families share: channels last, rotations as matrices, and the order of tokens that NABLA needs.

NABLA is Kandinsky's own block-sparse attention: tokens lie in patches of 8 x 8 of a frame, 64 of them are a block, and a mask of
blocks is built anew in each layer for FlexAttention. Under a patch our methods choose what is read, so that the mask is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from diffusers_accel.families.family import Observation, argument
from diffusers_accel.shape import ModelShape

SIDE = 8  # of a patch, in tokens


def shape_of(transformer: Any) -> ModelShape:
    """Heads are as wide as the rotations of their three axes."""
    config = transformer.config
    head_dim = sum(config.axes_dims)
    return ModelShape(config.num_visual_blocks, config.model_dim // head_dim, head_dim)


def out_layer_of(transformer: Any, name: str) -> Callable[[Tensor], Tensor]:
    """The linear map behind attention."""
    linear: Callable[[Tensor], Tensor] = transformer.get_submodule(name).out_layer
    return linear


def grid_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Observation:
    """Frames, height and width of latents [B, frames, height, width, C]."""
    return tuple(argument(args, kwargs, "hidden_states", 0).shape[1:4])


def in_patches(frames: int, height: int, width: int) -> Tensor:
    """int64 [tokens]: where each token, frame by frame and row by row, stands in the patches' order."""
    tokens = torch.arange(frames * height * width).view(frames, height // SIDE, width // SIDE, SIDE, SIDE)
    return tokens.transpose(2, 3).flatten()


def queries_keys_values(attn: Any, hidden_states: Tensor, rotations: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """q, k and v [B, S, H, D] of a self-attention module; q and k normed, turned, and rounded to `dtype`."""
    q, k, v = (
        project(hidden_states).unflatten(-1, (attn.num_heads, -1))
        for project in (attn.to_query, attn.to_key, attn.to_value)
    )
    q, k = (norm(x.float()).to(v.dtype) for norm, x in ((attn.query_norm, q), (attn.key_norm, k)))
    return *(_turned(x, rotations).to(dtype).to(v.dtype) for x in (q, k)), v


def _turned(x: Tensor, rotations: Tensor) -> Tensor:
    """Each pair of channels times its matrix of `rotations` [..., pairs, 2, 2], in fp32."""
    pairs = x.float().unflatten(-1, (-1, 1, 2))
    return (rotations.float() * pairs).sum(-1).flatten(-2)
