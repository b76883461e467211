"""LTX-2: packed video latents, whose audio and text come by cross-attention; guidance in one forward, and passes of their own.

Only the self-attention of the video is patched. Audio attends to itself, and to and from the video, as without us.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffusers_accel.families.family import Family, Observation, argument, optional, text_at
from diffusers_accel.families.ltx import masked_in_parallel
from diffusers_accel.layout import Segment, TokenLayout

SIZES = ("num_frames", "height", "width")  # arguments of the forward, from the eleventh on


def _observe(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Observation:
    tokens = argument(args, kwargs, "hidden_states", 0).shape[1]
    sizes = [optional(args, kwargs, name, at) for at, name in enumerate(SIZES, 10)]
    if None in sizes:
        raise ValueError(
            f"expected LTX-2's forward to be told into which num_frames, height and width its {tokens:,} tokens fold, found "
            f"{' x '.join(map(str, sizes))}: the DFR pipelines give coordinates alone, which is not supported. Call "
            "diffusers_accel.unpatch(pipe) for them"
        )
    return tokens, *sizes


def _layout(config: Any, observation: Observation) -> TokenLayout:
    """The video, then what the pipeline has appended: frames that it is conditioned on, or a reference video."""
    tokens, frames, height, width = observation
    patch = config.patch_size
    video = Segment.video((frames // config.patch_size_t, height // patch, width // patch))
    appended = tokens - video.tokens
    if appended < 0:
        raise ValueError(
            f"expected at least the {video.tokens:,} tokens of {frames} x {height} x {width} latents, found {tokens:,}: pass the "
            "sizes of these latents as num_frames, height and width"
        )
    return TokenLayout.of(video, *([Segment("condition", appended)] if appended else []))


LTX2 = Family(
    name="ltx2",
    transformer="diffusers.models.transformers.transformer_ltx2.LTX2VideoTransformer3DModel",
    attention_call="dispatch_attention_fn",
    observe=_observe,
    layout=_layout,
    text=text_at(2),
    latents=("hidden_states", "audio_hidden_states"),
    channels=2,
    no_parallel=masked_in_parallel,
)
