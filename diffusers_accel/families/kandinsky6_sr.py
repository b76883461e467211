"""Kandinsky 6 super-resolution: tiles of a video, no text, one forward a step, always with NABLA (see `kandinsky.py`).

Each tile, or batch of tiles, is a generation of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from diffusers_accel.families.family import Family, Observation, attention_of, patched
from diffusers_accel.families.kandinsky import grid_of, in_patches, out_layer_of, queries_keys_values, shape_of
from diffusers_accel.families.wan import layout_of_latents

_NO_TEXT = torch.zeros(0)  # there is one branch


def _places(config: Any, observation: Observation) -> Tensor:
    return in_patches(*patched(observation, config.patch_size))


def _text(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    return _NO_TEXT


def _call(
    attend: Callable[..., Tensor],
    processor: Any,
    attn: Any,
    hidden_states: Tensor,
    rotary_emb: Tensor,
    sparse_params: Any,
) -> Tensor:
    """Self-attention without NABLA's mask."""
    q, k, v = queries_keys_values(attn, hidden_states, rotary_emb, hidden_states.dtype)
    out = attend(q, k, v, parallel_config=processor._parallel_config)
    projected: Tensor = attn.out_layer(out.flatten(-2))
    return projected


KANDINSKY6_SR = Family(
    name="kandinsky6_sr",
    transformer="diffusers.models.transformers.transformer_kandinsky6_sr.Kandinsky6SRTransformer3DModel",
    attention_call="dispatch_attention_fn",
    self_attention=attention_of("visual_transformer_blocks", named="self_attention"),
    shape=shape_of,
    observe=grid_of,
    layout=layout_of_latents,
    places=_places,
    text=_text,
    call={"Kandinsky6SRAttnProcessor": _call},
    output_projection=out_layer_of,
    channels=-1,
    no_search="its tiles are generations of their own, and it takes no prompt",
)
