"""LTX-Video: packed latents whose sizes are arguments of the forward, text by cross-attention, guidance in one forward.

`LTXConditionPipeline` gives the coordinates of tokens instead of sizes, and puts frames that it is conditioned on in front.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

from torch import Tensor

from diffusers_accel.families.family import Family, Observation, argument, optional, text_at
from diffusers_accel.families.reading import last_grid, read_once
from diffusers_accel.layout import Segment, TokenLayout

SIZES = ("num_frames", "height", "width")  # arguments of the forward, from the fifth on


def _observe(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Observation:
    """The sizes of the video, and how many tokens stand in front of it."""
    tokens = argument(args, kwargs, "hidden_states", 0).shape[1]
    sizes = [optional(args, kwargs, name, at) for at, name in enumerate(SIZES, 4)]
    coordinates = optional(args, kwargs, "video_coords", 8)
    if sizes == [None] * 3 and coordinates is not None:
        sizes = list(read_once(coordinates, _grid))
        return (*sizes, tokens - prod(sizes))
    if None in sizes or prod(sizes) != tokens:
        raise ValueError(
            f"expected LTX's forward to be told into which num_frames, height and width its {tokens:,} tokens fold, or at which "
            f"video_coords they stand, found {' x '.join(map(str, sizes))}: LTXPipeline, LTXImageToVideoPipeline and "
            "LTXConditionPipeline say it; LTXI2VLongMultiPromptPipeline gives other sizes, which is not supported"
        )
    return (*sizes, 0)


def _grid(coordinates: Tensor) -> tuple[int, int, int]:
    """Of coordinates [B, 3, tokens]; conditions in front of the video have times later than its first, which is 0."""
    return last_grid(coordinates[0].T)


def _layout(config: Any, observation: Observation) -> TokenLayout:
    """The pipeline has packed the patches: the sizes are those of tokens."""
    *sizes, in_front = observation
    frames, height, width = sizes
    return TokenLayout.of(
        *([Segment("condition", in_front)] if in_front else []), Segment.video((frames, height, width))
    )


def masked_in_parallel(config: Any) -> str:
    return (
        "diffusers masks the text of its cross-attention for all heads and a piece of the text, where a process has some heads "
        "and all of the text"
    )


LTX = Family(
    name="ltx",
    transformer="diffusers.models.transformers.transformer_ltx.LTXVideoTransformer3DModel",
    attention_call="dispatch_attention_fn",
    observe=_observe,
    layout=_layout,
    text=text_at(1),
    channels=2,
    no_parallel=masked_in_parallel,
)
