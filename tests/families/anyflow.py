"""AnyFlow, tiny."""

from __future__ import annotations

import torch
from diffusers import AnyFlowPipeline, AnyFlowTransformer3DModel, FlowMapEulerDiscreteScheduler

from diffusers_accel.layout import TokenLayout
from tests.families.family import TinyFamily
from tests.families.wan import CONFIG, WITHOUT_TEXT, quiet
from tests.tiny import tiny_wan_call, tiny_wan_vae


def tiny_anyflow() -> AnyFlowPipeline:
    torch.manual_seed(0)
    return quiet(
        AnyFlowPipeline(
            **WITHOUT_TEXT,
            transformer=AnyFlowTransformer3DModel(**CONFIG).eval(),
            vae=tiny_wan_vae(),
            scheduler=FlowMapEulerDiscreteScheduler(shift=3.0),
        )
    )


# Both branches are one batch, which the pipeline does not name.
ANYFLOW = TinyFamily(
    tiny_anyflow,
    tiny_wan_call,
    TokenLayout(3, 16, 16),
    ("branch 0",),
    alone={"guidance_scale": 1.0, "negative_prompt_embeds": None},
)
