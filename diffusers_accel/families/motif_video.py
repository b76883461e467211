"""Motif-Video: video, then image tokens and padded text in one sequence; a guider runs the passes of guidance.

Its last blocks, the decoder, see no text: there the video that is decoded stands before the video that was encoded.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffusers_accel.families.family import Family, Observation, argument, optional, text_at
from diffusers_accel.families.hunyuan_video import HUNYUAN_VIDEO
from diffusers_accel.families.reading import read_once, row_sums
from diffusers_accel.layout import Segment, TokenLayout

_text = text_at(2)


def _observe(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Observation:
    image = optional(args, kwargs, "image_embeds", 4)
    sizes = argument(args, kwargs, "hidden_states", 0).shape[2:]
    return (*sizes, 0 if image is None else image.shape[1], _text(args, kwargs).shape[1])


def _layout(config: Any, observation: Observation) -> TokenLayout:
    """Latents [B, C, frames, height, width] in patches, then the image, then the text."""
    frames, height, width, image, text = observation
    patch = config.patch_size
    video = Segment.video((frames // config.patch_size_t, height // patch, width // patch))
    return TokenLayout.of(video, *([Segment("image", image)] if image else []), Segment("text", text))


def _layout_in(config: Any, layout: TokenLayout, layer: int) -> TokenLayout:
    if layer < config.num_layers + config.num_single_layers - config.num_decoder_layers:
        return layout
    return TokenLayout.of(Segment.video(layout.grid), Segment("condition", layout.video_tokens))


def _text_valid(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[int, ...]:
    mask = optional(args, kwargs, "encoder_attention_mask", 3)
    return (_text(args, kwargs).shape[1],) if mask is None else read_once(mask, row_sums)


MOTIF_VIDEO = Family(
    name="motif_video",
    transformer="diffusers.models.transformers.transformer_motif_video.MotifVideoTransformer3DModel",
    attention_call="dispatch_attention_fn",
    # Dual-stream, then single-stream blocks, of the same names and shapes as HunyuanVideo's.
    self_attention=HUNYUAN_VIDEO.self_attention,
    shape=HUNYUAN_VIDEO.shape,
    output_projection=HUNYUAN_VIDEO.output_projection,
    observe=_observe,
    layout=_layout,
    layout_in=_layout_in,
    text=_text,
    text_valid=_text_valid,
)
