"""Kandinsky 5: video tokens alone, text by cross-attention, guidance as two forwards that the pipelines do not name.

Some checkpoints (`attention_type="nabla"`) use NABLA, see `kandinsky.py`: its mask is left out under a patch, and `places` knows
its order of tokens. In the others tokens lie row by row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from diffusers_accel.families.family import Family, Observation, attention_of, optional, patched, text_at
from diffusers_accel.families.kandinsky import grid_of, in_patches, out_layer_of, queries_keys_values, shape_of
from diffusers_accel.layout import TokenLayout


def _observe(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Observation:
    nabla = optional(args, kwargs, "sparse_params", 7)
    return (*grid_of(args, kwargs), int(nabla is not None and nabla["to_fractal"]))


def _grid(config: Any, observation: Observation) -> tuple[int, int, int]:
    return patched(observation[:3], config.patch_size)


def _layout(config: Any, observation: Observation) -> TokenLayout:
    return TokenLayout(*_grid(config, observation))


def _places(config: Any, observation: Observation) -> Tensor | None:
    return in_patches(*_grid(config, observation)) if observation[3] else None


def _call(
    attend: Callable[..., Tensor],
    processor: Any,
    attn: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None = None,
    rotary_emb: Tensor | None = None,
    sparse_params: Any = None,
) -> Tensor:
    """Self-attention without NABLA's mask; the model rounds turned q and k to bf16 whatever its own dtype is."""
    assert encoder_hidden_states is None and rotary_emb is not None
    q, k, v = queries_keys_values(attn, hidden_states, rotary_emb, torch.bfloat16)
    out = attend(q, k, v, parallel_config=processor._parallel_config)
    projected: Tensor = attn.out_layer(out.flatten(-2))
    return projected


KANDINSKY5 = Family(
    name="kandinsky5",
    transformer="diffusers.models.transformers.transformer_kandinsky.Kandinsky5Transformer3DModel",
    attention_call="dispatch_attention_fn",
    self_attention=attention_of("visual_transformer_blocks", named="self_attention"),
    shape=shape_of,
    observe=_observe,
    layout=_layout,
    places=_places,
    text=text_at(1),
    call={"Kandinsky5AttnProcessor": _call},
    output_projection=out_layer_of,
    channels=-1,
)
