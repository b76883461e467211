"""SkyReels-V2, tiny: text to video, image to video, and diffusion forcing, where each frame has its own timestep."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    SkyReelsV2DiffusionForcingPipeline,
    SkyReelsV2ImageToVideoPipeline,
    SkyReelsV2Pipeline,
    SkyReelsV2Transformer3DModel,
    UniPCMultistepScheduler,
)

from diffusers_accel.layout import TokenLayout
from tests.families.family import TinyFamily
from tests.families.wan import CONFIG, SEES_IMAGES, WITHOUT_TEXT, image_call, quiet, tiny_clip
from tests.tiny import tiny_wan_call, tiny_wan_vae


def parts(**config: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    return {
        **WITHOUT_TEXT,
        "transformer": SkyReelsV2Transformer3DModel(**{**CONFIG, **config}).eval(),
        "vae": tiny_wan_vae(),
        "scheduler": UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=8.0),
    }


def tiny_skyreels() -> SkyReelsV2Pipeline:
    return quiet(SkyReelsV2Pipeline(**parts()))


def tiny_skyreels_image() -> SkyReelsV2ImageToVideoPipeline:
    return quiet(SkyReelsV2ImageToVideoPipeline(**parts(**SEES_IMAGES, in_channels=4 + 2 + 4), **tiny_clip()))


def tiny_forcing() -> SkyReelsV2DiffusionForcingPipeline:
    return quiet(SkyReelsV2DiffusionForcingPipeline(**parts(inject_sample_info=True)))


def forcing_call(**overrides: Any) -> dict[str, Any]:
    return {**tiny_wan_call(), "prompt": None, **overrides}


GRID, BRANCHES = TokenLayout(3, 16, 16), ("cond", "uncond")
SKYREELS_V2 = TinyFamily(tiny_skyreels, tiny_wan_call, GRID, BRANCHES)
# The pipeline repeats CLIP's tokens for each prompt, not for each video.
SKYREELS_V2_IMAGE = TinyFamily(tiny_skyreels_image, image_call, GRID, BRANCHES, several={"prompts": 2})
SKYREELS_V2_FORCING = TinyFamily(tiny_forcing, forcing_call, GRID, BRANCHES)
