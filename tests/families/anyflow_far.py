"""AnyFlow-FAR, tiny: one chunk of 3 latent frames, with nothing before it."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AnyFlowFARPipeline, AnyFlowFARTransformer3DModel, FlowMapEulerDiscreteScheduler

from diffusers_accel.layout import TokenLayout
from tests.families.family import TinyFamily
from tests.families.wan import CONFIG, WITHOUT_TEXT, embeddings, quiet
from tests.tiny import tiny_wan_call, tiny_wan_vae


def tiny_far() -> AnyFlowFARPipeline:
    torch.manual_seed(0)
    return quiet(
        AnyFlowFARPipeline(
            **WITHOUT_TEXT,
            transformer=AnyFlowFARTransformer3DModel(**CONFIG, full_chunk_limit=2, chunk_partition=(3,)).eval(),
            vae=tiny_wan_vae(),
            scheduler=FlowMapEulerDiscreteScheduler(shift=3.0),
        )
    )


def far_call(prompts: int = 1, **overrides: Any) -> dict[str, Any]:
    return {**tiny_wan_call(), **embeddings(8, prompts), **overrides}


# Both branches are one batch, which the pipeline does not name. Stock attention is another function (flex).
ANYFLOW_FAR = TinyFamily(
    tiny_far,
    far_call,
    TokenLayout(3, 16, 16),
    ("branch 0",),
    bitwise=False,
    alone={"guidance_scale": 1.0, "negative_prompt_embeds": None},
    size={"width": 80},  # 960 tokens, not a number of whole blocks
    several={"prompts": 2},
)
