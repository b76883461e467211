"""Kandinsky 6 super-resolution, tiny, with NABLA at a threshold that selects everything."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    Kandinsky6SRPipeline,
    Kandinsky6SRTransformer3DModel,
    Kandinsky6SRVAE,
)

from diffusers_accel.layout import TokenLayout
from tests.families.family import TinyFamily
from tests.tiny import LAYERS


def tiny_kandinsky6_sr() -> Kandinsky6SRPipeline:
    torch.manual_seed(0)
    transformer = Kandinsky6SRTransformer3DModel(
        in_visual_dim=4,
        out_visual_dim=4,
        time_dim=8,
        model_dim=64,
        ff_dim=64,
        num_visual_blocks=LAYERS,
        axes_dims=(4, 6, 6),
        nabla_threshold=1.0,
        tile_sizes=((64, 64), (64, 96)),
    )
    vae = Kandinsky6SRVAE(
        latent_channels=4,
        encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        layers_per_block=1,
        temporal_compression_start_level=0,
    )
    pipe = Kandinsky6SRPipeline(
        transformer=transformer.eval(), vae=vae.eval(), scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0)
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def video(width: int = 32) -> torch.Tensor:
    return torch.rand(1, 9, 3, 32, width, generator=torch.Generator().manual_seed(1))


def tiny_kandinsky6_sr_call(seed: int = 0, **overrides: Any) -> dict[str, Any]:
    """Arguments for `pipe(**...)`: 9 frames of 32 x 32, one tile, to 64 x 64 -> 3 x 16 x 16 = 768 tokens; 5 steps."""
    call: dict[str, Any] = {
        "video": video(),
        "resolution_scale": 2,
        "num_inference_steps": 5,
        "generator": torch.Generator().manual_seed(seed),
        **overrides,
    }
    return {**call, "output_type": "np"}  # there is no other array


KANDINSKY6_SR = TinyFamily(
    tiny_kandinsky6_sr,
    tiny_kandinsky6_sr_call,
    TokenLayout(3, 16, 16),
    ("branch 0",),
    bitwise=False,  # attention in another order
    alone={},  # it has no guidance
    size={"video": video(48)},
    several={"video": video(40), "tiles_batch_size": 2},  # two tiles as one batch
)
