"""Helios, tiny: one chunk of 3 latent frames behind 1 + 7 of history."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import HeliosPipeline, HeliosScheduler, HeliosTransformer3DModel

from diffusers_accel.layout import Segment, TokenLayout
from tests.families.family import TinyFamily
from tests.families.wan import CONFIG, WITHOUT_TEXT, embeddings, quiet
from tests.tiny import tiny_wan_call, tiny_wan_vae

HISTORY = (
    Segment("history", 16, (1, 4, 4)),  # 4 frames
    Segment("history", 64, (1, 8, 8)),  # 2 frames
    Segment("history", 512, (2, 16, 16)),  # the first frame of all and the last before the chunk
)


def tiny_helios() -> HeliosPipeline:
    torch.manual_seed(0)
    config = {name: value for name, value in CONFIG.items() if name != "rope_max_seq_len"}
    transformer = HeliosTransformer3DModel(**config, rope_dim=(4, 6, 6), is_amplify_history=True)
    return quiet(
        HeliosPipeline(
            **WITHOUT_TEXT,
            vae=tiny_wan_vae(),
            scheduler=HeliosScheduler(stages=1, stage_range=[0, 1]),
            transformer=transformer.eval(),
        )
    )


def helios_call(prompts: int = 1, **overrides: Any) -> dict[str, Any]:
    chunk = {"history_sizes": [4, 2, 1], "num_latent_frames_per_chunk": 3}
    return {**tiny_wan_call(), **embeddings(8, prompts), **chunk, **overrides}


# The pipeline makes one video for each prompt.
HELIOS = TinyFamily(
    tiny_helios,
    helios_call,
    TokenLayout.of(*HISTORY, Segment.video((3, 16, 16))),
    ("cond", "uncond"),
    several={"prompts": 2},
)
