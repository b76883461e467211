"""SkyReels-V2: Wan's tokens, video only; CFG is two branches.

Diffusion forcing gives each frame its own timestep, which changes nothing here. With blocks of several frames that see no later
ones (`causal_block_size`) it masks self-attention, and is refused.
"""

from __future__ import annotations

from typing import Any

from diffusers_accel.families.family import Family, Observation, attention_of, text_at
from diffusers_accel.families.wan import TIME_EMBEDDINGS, layout_of_latents, observe_latents
from diffusers_accel.layout import TokenLayout


def _layout(config: Any, observation: Observation) -> TokenLayout:
    if config.num_frame_per_block > 1:
        raise ValueError(
            "expected SkyReels-V2 with every frame seeing every other, found num_frame_per_block "
            f"{config.num_frame_per_block}, which lets a block of frames see no later one: call the pipeline with "
            "causal_block_size=1, or diffusers_accel.unpatch(pipe) for such calls"
        )
    return layout_of_latents(config, observation)


SKYREELS_V2 = Family(
    name="skyreels_v2",
    transformer="diffusers.models.transformers.transformer_skyreels_v2.SkyReelsV2Transformer3DModel",
    attention_call="dispatch_attention_fn",
    self_attention=attention_of("blocks"),
    observe=observe_latents,
    layout=_layout,
    text=text_at(2),
    indicators=TIME_EMBEDDINGS,
)
