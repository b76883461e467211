"""Wan VACE, tiny: two control blocks, then three blocks; and with a reference image as a further frame in front."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanVACEPipeline, WanVACETransformer3DModel

from diffusers_accel.layout import TokenLayout
from tests.families.family import TinyFamily
from tests.families.wan import CONFIG, WITHOUT_TEXT, picture, quiet
from tests.tiny import tiny_wan_call, tiny_wan_vae


def tiny_vace() -> WanVACEPipeline:
    torch.manual_seed(0)
    transformer = WanVACETransformer3DModel(**CONFIG, vace_layers=[0, 2], vace_in_channels=4 + 4 + 4)
    return quiet(
        WanVACEPipeline(
            **WITHOUT_TEXT,
            vae=tiny_wan_vae(),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            transformer=transformer.eval(),
        )
    )


def vace_call(references: int = 0, **overrides: Any) -> dict[str, Any]:
    call: dict[str, Any] = {**tiny_wan_call(), "video": [picture(seed) for seed in range(5)]}
    if references:
        call["reference_images"] = [picture(9 + seed) for seed in range(references)]
    return {**call, **overrides}


# The pipeline makes one video at a time.
WAN_VACE = TinyFamily(tiny_vace, vace_call, TokenLayout(3, 16, 16), ("cond", "uncond"), several={})
WAN_VACE_REFERENCE = TinyFamily(
    tiny_vace, partial(vace_call, references=1), TokenLayout(4, 16, 16), ("cond", "uncond"), several={}
)
