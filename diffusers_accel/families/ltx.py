"""LTX-Video: packed latents whose sizes are arguments of the forward, text by cross-attention, guidance in one forward."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffusers_accel.families.family import Family, Observation, argument, text_at
from diffusers_accel.layout import TokenLayout

SIZES = ("num_frames", "height", "width")  # arguments of the forward, from the fifth on


def _observe(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Observation:
    tokens = argument(args, kwargs, "hidden_states", 0).shape[1]
    sizes = [kwargs.get(name, args[at] if len(args) > at else None) for at, name in enumerate(SIZES, 4)]
    if None in sizes or sizes[0] * sizes[1] * sizes[2] != tokens:
        raise ValueError(
            f"expected LTX's forward to be told into which num_frames, height and width its {tokens:,} tokens fold, found "
            f"{' x '.join(map(str, sizes))}: LTXPipeline and LTXImageToVideoPipeline say it; LTXConditionPipeline and "
            "LTXI2VLongMultiPromptPipeline give coordinates instead, which is not supported"
        )
    return tuple(sizes)


def _layout(config: Any, observation: Observation) -> TokenLayout:
    """The pipeline has packed the patches: the sizes are those of tokens."""
    frames, height, width = observation
    return TokenLayout(frames, height, width)


LTX = Family(
    name="ltx",
    transformer="diffusers.models.transformers.transformer_ltx.LTXVideoTransformer3DModel",
    attention_call="dispatch_attention_fn",
    observe=_observe,
    layout=_layout,
    text=text_at(1),
    channels=2,
)
