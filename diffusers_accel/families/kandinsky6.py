"""Kandinsky 6: video and audio side by side in fused blocks, of which only the video's self-attention is patched.

Text and audio come by cross-attention; guidance is two named forwards. A reference image is a frame behind the video's last.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from diffusers_accel.families.family import Family, Observation, attention_of, optional, text_at
from diffusers_accel.families.kandinsky import grid_of, out_layer_of, shape_of
from diffusers_accel.families.reading import read_once
from diffusers_accel.layout import Segment, TokenLayout


def _observe(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Observation:
    kinds = optional(args, kwargs, "visual_token_type_ids", 7)
    return (*grid_of(args, kwargs), 0 if kinds is None else read_once(kinds, _references))


def _references(kinds: Tensor) -> int:
    """How many frames, the last ones, are references, in [B, frames] of which these are marked."""
    return int(kinds[0].count_nonzero())


def _layout(config: Any, observation: Observation) -> TokenLayout:
    """Latents [B, frames, height, width, C] in patches of one frame."""
    frames, height, width, references = observation
    _, rows, columns = config.patch_size
    height, width = height // rows, width // columns
    if not references:
        return TokenLayout(frames, height, width)
    reference = Segment("reference", references * height * width, (references, height, width))
    return TokenLayout.of(Segment.video((frames - references, height, width)), reference)


KANDINSKY6 = Family(
    name="kandinsky6",
    transformer="diffusers.models.transformers.transformer_kandinsky6.Kandinsky6Transformer3DModel",
    attention_call="dispatch_attention_fn",
    self_attention=attention_of("visual_transformer_blocks", named="video_dec_block.self_attention"),
    shape=shape_of,
    observe=_observe,
    layout=_layout,
    text=text_at(1),
    output_projection=out_layer_of,
    latents=("hidden_states", "audio_hidden_states"),
    channels=-1,
)
