"""Mochi: video, then padded text in one sequence; both branches of guidance in one forward.

The stock processor takes the batch row by row, and reads from the mask in each layer how much text exists. The one here attends
once, and leaves the lengths to the layout.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from diffusers_accel.families.family import Family, Observation, argument, text_at
from diffusers_accel.families.projections import heads_of
from diffusers_accel.families.reading import read_once, row_sums
from diffusers_accel.layout import TokenLayout

_text = text_at(1)


def _observe(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Observation:
    return (*argument(args, kwargs, "hidden_states", 0).shape[2:], _text(args, kwargs).shape[1])


def _layout(config: Any, observation: Observation) -> TokenLayout:
    """Latents [B, C, frames, height, width] in patches of one frame, then the text."""
    frames, height, width, text = observation
    return TokenLayout(frames, height // config.patch_size, width // config.patch_size, text, "end")


def _text_valid(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[int, ...]:
    return read_once(argument(args, kwargs, "encoder_attention_mask", 3), row_sums)


def _call(
    attend: Callable[[Tensor, Tensor, Tensor], Tensor],
    processor: Any,
    attn: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    image_rotary_emb: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of video and text together, each with projections of its own; positions turn the video's alone."""

    heads = partial(heads_of, attn)
    video = [heads(hidden_states, attn.to_q, attn.norm_q), heads(hidden_states, attn.to_k, attn.norm_k)]
    if image_rotary_emb is not None:
        video = [_turned(x, *image_rotary_emb) for x in video]
    text = (
        heads(encoder_hidden_states, attn.add_q_proj, attn.norm_added_q),
        heads(encoder_hidden_states, attn.add_k_proj, attn.norm_added_k),
    )
    q, k = (torch.cat(pair, dim=1) for pair in zip(video, text, strict=True))
    v = torch.cat([heads(hidden_states, attn.to_v), heads(encoder_hidden_states, attn.add_v_proj)], dim=1)
    out = attend(q, k, v).flatten(2)
    of_video, of_text = out.split([hidden_states.shape[1], encoder_hidden_states.shape[1]], dim=1)
    of_text = attn.to_add_out(of_text) if hasattr(attn, "to_add_out") else of_text
    return attn.to_out[1](attn.to_out[0](of_video)), of_text


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Neighbouring channels of x [B, tokens, heads, head_dim] as complex numbers, turned by angles [tokens, heads, half]."""
    real, imaginary = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([real * cos - imaginary * sin, real * sin + imaginary * cos], dim=-1)
    return turned.flatten(-2).to(x.dtype)


MOCHI = Family(
    name="mochi",
    transformer="diffusers.models.transformers.transformer_mochi.MochiTransformer3DModel",
    attention_call="F.scaled_dot_product_attention",
    observe=_observe,
    layout=_layout,
    text=_text,
    text_valid=_text_valid,
    call={"MochiAttnProcessor2_0": _call},
)
