"""ChronoEdit, tiny: 5 frames from the image to its edit."""

from __future__ import annotations

import torch
from diffusers import ChronoEditPipeline, ChronoEditTransformer3DModel, UniPCMultistepScheduler

from diffusers_accel.layout import TokenLayout
from tests.families.family import TinyFamily
from tests.families.wan import CONFIG, SEES_IMAGES, WITHOUT_TEXT, image_call, quiet, tiny_clip
from tests.tiny import tiny_wan_vae


def tiny_chronoedit() -> ChronoEditPipeline:
    torch.manual_seed(0)
    transformer = ChronoEditTransformer3DModel(**{**CONFIG, **SEES_IMAGES, "in_channels": 4 + 2 + 4})
    return quiet(
        ChronoEditPipeline(
            **WITHOUT_TEXT,
            **tiny_clip(),
            transformer=transformer.eval(),
            vae=tiny_wan_vae(),
            scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        )
    )


# The pipeline names no branches, and repeats CLIP's tokens for each prompt, not for each video.
CHRONOEDIT = TinyFamily(
    tiny_chronoedit, image_call, TokenLayout(3, 16, 16), ("branch 0", "branch 1"), several={"prompts": 2}
)
