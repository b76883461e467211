"""AnyFlow, tiny."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AnyFlowPipeline, AnyFlowTransformer3DModel, FlowMapEulerDiscreteScheduler

from diffusers_accel.layout import TokenLayout
from tests.families.family import TinyFamily
from tests.families.wan import CONFIG, WITHOUT_TEXT, embeddings, quiet
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


def anyflow_call(prompts: int = 1, **overrides: Any) -> dict[str, Any]:
    return {**tiny_wan_call(), **embeddings(8, prompts), **overrides}


# Both branches are one batch, which the pipeline does not name. Embeddings that it is given are not repeated for several videos,
# and an unused negative one is not left out.
ANYFLOW = TinyFamily(
    tiny_anyflow,
    anyflow_call,
    TokenLayout(3, 16, 16),
    ("branch 0",),
    alone={"guidance_scale": 1.0, "negative_prompt_embeds": None},
    several={"prompts": 2},
)
