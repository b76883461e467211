"""FramePack: frames of history at three scales, then the frames that are made, then image tokens and text in one sequence.

A video is made in sections, each with a schedule of its own. Guidance is distilled into the model: one forward a step, or two
with true CFG, which the pipeline gives no names.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil
from typing import Any

from torch import Tensor

from diffusers_accel.families.family import Family, Observation, argument, optional, text_at
from diffusers_accel.families.hunyuan_video import HUNYUAN_VIDEO
from diffusers_accel.families.reading import read_once, row_sums
from diffusers_accel.layout import Segment, TokenLayout

# Latents of the history with the indices of their frames, by their places among the arguments of the forward, in the order of
# the sequence; and the patches (frames, height, width) that become one token.
HISTORY = (
    (("latents_history_4x", "indices_latents_history_4x"), 12, (4, 8, 8)),
    (("latents_history_2x", "indices_latents_history_2x"), 10, (2, 4, 4)),
    (("latents_clean", "indices_latents_clean"), 8, (1, 2, 2)),
)
_text = text_at(2)


def _observe(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Observation:
    """Latents, tokens of the history, of the image and of the text."""
    sizes = argument(args, kwargs, "hidden_states", 0).shape[2:]
    history = sum(
        _tokens([optional(args, kwargs, name, at) for at, name in enumerate(names, first)], patch)
        for names, first, patch in HISTORY
    )
    image = argument(args, kwargs, "image_embeds", 5).shape[1]
    lengths = read_once(argument(args, kwargs, "encoder_attention_mask", 3), row_sums)
    text = (
        lengths[0] if len(lengths) == 1 else _text(args, kwargs).shape[1]
    )  # a single prompt comes without its padding
    return (*sizes, history, image, text)


def _tokens(history: list[Tensor | None], patch: tuple[int, int, int]) -> int:
    """Of latents [B, C, frames, height, width], padded to whole patches. The model leaves out those without indices."""
    latents, indices = history
    if latents is None or indices is None:
        return 0
    frames, height, width = (ceil(size / each) for size, each in zip(latents.shape[2:], patch, strict=True))
    return frames * height * width


def _layout(config: Any, observation: Observation) -> TokenLayout:
    frames, height, width, history, image, text = observation
    patch = config.patch_size
    video = Segment.video((frames // config.patch_size_t, height // patch, width // patch))
    return TokenLayout.of(
        *([Segment("history", history)] if history else []),
        video,
        Segment("image", image),
        *([Segment("text", text)] if text else []),
    )


def _text_valid(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[int, ...]:
    return read_once(argument(args, kwargs, "encoder_attention_mask", 3), row_sums)


FRAMEPACK = Family(
    name="framepack",
    transformer="diffusers.models.transformers.transformer_hunyuan_video_framepack.HunyuanVideoFramepackTransformer3DModel",
    attention_call="dispatch_attention_fn",
    self_attention=HUNYUAN_VIDEO.self_attention,
    shape=HUNYUAN_VIDEO.shape,
    output_projection=HUNYUAN_VIDEO.output_projection,
    observe=_observe,
    layout=_layout,
    text=_text,
    text_valid=_text_valid,
    history=True,
    preset=HUNYUAN_VIDEO.preset,
)
